"""Times `raas_kernels.attend`: the whole cache, some of its pages, codes, other scores, pages in blocks."""

import argparse
from functools import partial

import torch
from common import HEAD_SIZE, Case, cold_copies, encode, in_turn, main, make_kv, make_query, move_to_blocks

from raas_kernels import attend


def prepare(batch, budget, options, code=None, share=None, has_blocks=False, **settings):
    calls = []
    for _ in range(cold_copies(batch, budget, options)):
        kv, query = make_kv(batch, budget, options), make_query(batch, options)
        if code is not None:
            encode(kv, code)
        if has_blocks:
            move_to_blocks(kv)
        selected = None
        if share is not None:
            order = torch.rand(kv.priority.shape, device=options.device).argsort(-1)
            selected = order[..., : kv.num_pages // share].contiguous()
        calls.append(partial(attend, kv, query, HEAD_SIZE**-0.5, selected=selected, **settings))
    return in_turn(calls)


def make_cases(options: argparse.Namespace) -> list[Case]:
    kinds = {
        "": {},
        ", a quarter of the pages": {"share": 4},
        ", int8": {"code": torch.int8},
        ", int4": {"code": torch.uint8},
        ", in blocks": {"has_blocks": True},
        ", int8 in blocks": {"has_blocks": True, "code": torch.int8},
        ", sum and mean": {"page_score": "sum", "group_score": "mean"},
    }
    return [
        (f"batch {batch}, {budget:,} tokens{kind}", partial(prepare, batch, budget, options, **settings))
        for batch, budget in ((1, 1024), (1, 8192), (16, 1024))
        for kind, settings in kinds.items()
    ]


if __name__ == "__main__":
    main(__file__, __doc__, make_cases)
