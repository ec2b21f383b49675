"""Times `raas_kernels.page_logit_bounds`: with key_min and key_max kept, and computed of the keys."""

import argparse
from functools import partial

from common import HEAD_SIZE, Case, cold_copies, in_turn, main, make_kv, make_query

from raas_kernels import page_logit_bounds


def prepare(batch, budget, options, **buffers):
    calls = []
    for _ in range(cold_copies(batch, budget, options)):
        kv, query = make_kv(batch, budget, options, **buffers), make_query(batch, options)
        calls.append(partial(page_logit_bounds, kv, query, HEAD_SIZE**-0.5))
    return in_turn(calls)


def make_cases(options: argparse.Namespace) -> list[Case]:
    return [
        (f"batch {batch}, {budget:,} tokens{kind}", partial(prepare, batch, budget, options, bounds=kept))
        for batch, budget in ((1, 1024), (1, 8192), (16, 1024))
        for kind, kept in (("", True), (", of the keys", False))
    ]


if __name__ == "__main__":
    main(__file__, __doc__, make_cases)
