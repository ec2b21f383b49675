"""Times `raas_kernels.append`: one page of 16 tokens a call, of which the first recycles a page."""

import argparse
from functools import partial

import torch
from common import HEAD_SIZE, HEADS, PAGE, Case, encode, main, make_kv

from raas_kernels import append


def prepare(batch, budget, options, code=None, spread=0, rows=None, **buffers):
    kv = make_kv(batch, budget, options, **buffers)
    if code is not None:
        encode(kv, code)
    kv.clock += spread * torch.arange(batch, device=options.device)[:, None, None]
    index = None if rows is None else torch.arange(rows, device=options.device)
    shape = rows or batch, HEADS, 1, HEAD_SIZE
    key, value = (torch.randn(shape, dtype=options.dtype, device=options.device) for _ in range(2))

    def call():
        for _ in range(PAGE):
            append(kv, key, value, rows=index)

    return call


def make_cases(options: argparse.Namespace) -> list[Case]:
    kinds = {
        "": {},
        ", key_min, key_max and states": {"bounds": True, "states": True},
        ", int8": {"code": torch.int8},
        ", int4": {"code": torch.uint8},
        ", rows out of step": {"spread": 1},
        ", half of the rows": {"rows": 8},
    }
    return [
        (f"batch {batch}, {budget:,} tokens{kind}", partial(prepare, batch, budget, options, **settings))
        for batch, budget in ((1, 1024), (16, 1024))
        for kind, settings in kinds.items()
        if batch > 1 or "row" not in kind
    ]


if __name__ == "__main__":
    main(__file__, __doc__, make_cases)
