"""Times `raas_kernels.stamp`: by alpha and by top_ratio, rows in step and out of step."""

import argparse
from functools import partial

import torch
from common import Case, main, make_kv

from raas_kernels import stamp


def prepare(batch, budget, options, alpha, top_ratio, spread=0):
    kv = make_kv(batch, budget, options)
    kv.clock += spread * torch.arange(batch, device=options.device)[:, None, None]
    scores = torch.rand(kv.priority.shape, device=options.device)
    return partial(stamp, kv, scores, alpha, top_ratio)


def make_cases(options: argparse.Namespace) -> list[Case]:
    kinds = {
        "alpha": {"alpha": 0.5, "top_ratio": None},
        "top_ratio": {"alpha": None, "top_ratio": 0.5},
        "alpha, rows out of step": {"alpha": 0.5, "top_ratio": None, "spread": 1},
    }
    return [
        (f"batch {batch}, {budget:,} tokens, {kind}", partial(prepare, batch, budget, options, **settings))
        for batch, budget in ((1, 1024), (16, 1024), (1, 8192))
        for kind, settings in kinds.items()
        if batch > 1 or "row" not in kind
    ]


if __name__ == "__main__":
    main(__file__, __doc__, make_cases)
