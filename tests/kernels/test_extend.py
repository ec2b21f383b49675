"""`raas_kernels.extend` and `resident` against loops over rows, heads, queries and slots, in float64."""

import pytest
import torch

from raas_kernels import extend, resident

from . import by_hand
from .helpers import CODES, DEVICE, decoded, make_kv, relative_error


TURN = 5


def make_inputs(rows=None, length=TURN, per_row=False, **shape):
    """A cache of three rows, the queries of its newest `length` tokens, and the queries' positions, perhaps per row."""
    kv = make_kv(batch=3, page_size=4, dk=6, dv=5, dtype=torch.float64, **shape)
    end = kv.bias.shape[2] - kv.page_size - kv.page_size // 2  # slots that hold a token
    tokens = torch.arange(end - length, end, device=DEVICE)
    if per_row:
        offsets = torch.tensor([[0], [7], [2]], device=DEVICE)
        kv.positions[kv.positions >= 0] += offsets[:, None].expand_as(kv.positions)[kv.positions >= 0].int()
        tokens = tokens + offsets
        tokens = tokens if rows is None else tokens[rows]
    batch = 3 if rows is None else len(rows)
    return kv, torch.randn(batch, 6, length, 6, dtype=torch.float64, device=DEVICE), tokens


def check(kv, query, tokens, **options):
    found = extend(kv, query, tokens, 0.4, **options)
    options.pop("max_logits", None)
    expected = by_hand.extend(kv, query, tokens, 0.4, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


OPTIONS = [
    {},
    {"softcap": 1.5, "sinks": torch.linspace(-2, 2, 6).double().to(DEVICE)},
    {"page_score": "sum", "group_score": "mean", "observed": 2},
    {"group_score": "mean", "heads_share": True},
    {"page_score": "sum", "heads_share": True, "observed": 0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "causal")
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_against_loops(rows, per_row, options):
    rows = None if rows is None else torch.tensor(rows, device=DEVICE)
    check(*make_inputs(rows, per_row=per_row, strided=True), rows=rows, **options)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("rows", [None, [1, 2]])
def test_each_query_sees_the_new_tokens_that_among_names(rows, per_row):
    """A mask between the new tokens that is not causal; the new tokens are more than the queries."""
    rows = None if rows is None else torch.tensor(rows, device=DEVICE)
    kv, query, tokens = make_inputs(rows, per_row=per_row)
    among = torch.rand(len(query), TURN, TURN + 2, device=DEVICE) < 0.5
    among[..., 0] = True
    check(kv, query, tokens, among=among, rows=rows, page_score="sum")


@pytest.mark.parametrize("block", [1, 2, 5])
def test_blocks_of_queries_give_the_same(block):
    kv, query, tokens = make_inputs(per_row=True)
    logits = query.shape[0] * query.shape[1] * kv.bias.shape[2]
    check(kv, query, tokens, max_logits=block * logits, page_score="sum", observed=3)


def test_a_hidden_query_gives_no_score():
    kv, query, tokens = make_inputs()
    kv.bias[0].masked_fill_(kv.positions[0] == tokens[-1], float("-inf"))
    check(kv, query, tokens, page_score="sum")
    check(kv, query, tokens, observed=1)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_codes(code):
    kv = make_kv(batch=2, page_size=4, code=code)
    query, tokens = torch.randn(2, 4, 3, 16, device=DEVICE), torch.tensor([11, 12, 13], device=DEVICE)
    for rows in (None, torch.tensor([1, 0], device=DEVICE)):
        found = extend(kv, query, tokens, 0.3, rows=rows)
        expected = extend(decoded(kv), query.double(), tokens, 0.3, rows=rows)
        assert all(relative_error(*pair) < 1e-5 for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("rows", [None, [2, 1]])
@pytest.mark.parametrize("per_row", [False, True])
def test_resident_tokens_are_in_the_cache_and_visible(per_row, rows):
    kv, _, _ = make_inputs()
    kv.bias[1].masked_fill_(kv.positions[1] == 9, float("-inf"))
    chosen = range(3) if rows is None else rows
    tokens = torch.tensor([0, 4, 9, 13, 99], device=DEVICE)
    if per_row:
        tokens = torch.stack([tokens.roll(i) for i in range(len(chosen))])
    found = resident(kv, tokens, None if rows is None else torch.tensor(rows, device=DEVICE))
    for i, row in enumerate(chosen):
        for head in range(2):
            shown = kv.positions[row, head][kv.bias[row, head] == 0].tolist()
            asked = (tokens[i] if per_row else tokens).tolist()
            assert found[i, head].tolist() == [token in shown for token in asked]
