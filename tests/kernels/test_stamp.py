"""`raas_kernels.stamp`: the torch engine against loops, the Triton kernel against the torch engine."""

import itertools

import pytest
import torch

from . import by_hand
from .helpers import DEVICE, copied, make_kv, reference, triton_engine


fused = triton_engine()
RULES = [(0.5, None), (None, 0.5), (None, 0.07)]


def make_inputs(decode_pages, batch=2, in_step=True, rows_differ=False, rows=None):
    """A cache and the scores of its pages."""
    pages = decode_pages + 3
    kv = make_kv(
        batch=batch, pages=pages, decode_pages=decode_pages, page_size=4, dk=1, dv=1, seed=1, rows_differ=rows_differ
    )
    kv.positions[:] = torch.argsort(torch.rand(batch, 2, 4 * pages, device=DEVICE)).int()
    # Scores on a coarse grid: ties are common, and must go to the older page.
    scores = (torch.rand(batch, 2, pages, device=DEVICE) * 8).round() / 8
    kv.priority[..., -2:], scores[..., -2:] = float("-inf"), 0
    kv.clock[:] = torch.tensor([77, 5], device=DEVICE)
    if not in_step:
        kv.clock += torch.arange(batch * 2, device=DEVICE).view(batch, 2, 1)
    return kv, scores if rows is None else scores[rows]


def assert_stamped(kv, expected):
    """Evictable pages have the same priority; the priority of all others has no meaning."""
    evictable = kv.evictable[:, None].expand_as(kv.priority)
    assert torch.equal(kv.priority[evictable], expected.priority[evictable])


@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize("decode_pages", [5, 70])
@pytest.mark.parametrize(("alpha", "top_ratio"), RULES)
def test_triton(alpha, top_ratio, decode_pages, in_step):
    check_triton(alpha, top_ratio, decode_pages, in_step)


def check_triton(alpha, top_ratio, decode_pages, in_step=True):
    kv, scores = make_inputs(decode_pages, in_step=in_step)
    expected = copied(kv)
    reference.stamp(expected, scores, alpha, top_ratio)
    fused.stamp(kv, scores, alpha, top_ratio)
    assert torch.equal(kv.priority, expected.priority)
    for row, head in itertools.product(range(2), range(2)):
        now = kv.clock[row, head, 0]
        evictable = expected.priority[row, head][kv.evictable[row]]
        assert (evictable == now).any() and (evictable != now).any()


@pytest.mark.parametrize("engine", [reference, fused], ids=["torch", "triton"])
@pytest.mark.parametrize("rows", [None, [2, 0]])
@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize(("alpha", "top_ratio"), RULES)
def test_against_loops(alpha, top_ratio, in_step, rows, engine):
    """Rows with pinned pages of their own, in any order; rows that are not named stay as they are."""
    rows = None if rows is None else torch.tensor(rows, device=DEVICE)
    kv, scores = make_inputs(9, batch=3, in_step=in_step, rows_differ=True, rows=rows)
    before, expected = copied(kv), copied(kv)
    by_hand.stamp(expected, scores, alpha, top_ratio, rows)
    engine.stamp(kv, scores, alpha, top_ratio, rows)
    assert_stamped(kv, expected)
    assert rows is None or torch.equal(kv.priority[1], before.priority[1])


@pytest.mark.parametrize("engine", [reference, fused], ids=["torch", "triton"])
@pytest.mark.parametrize(("alpha", "top_ratio"), RULES)
def test_scores_that_all_heads_share(alpha, top_ratio, engine):
    """With `granularity="layer"` one score is expanded to all KV heads: a view with stride 0."""
    kv, scores = make_inputs(6)
    shared = scores[:, :1].expand_as(scores)
    expected = copied(kv)
    by_hand.stamp(expected, shared, alpha, top_ratio)
    engine.stamp(kv, shared, alpha, top_ratio)
    assert_stamped(kv, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("decode_pages", [64, 4096])
def test_triton_at_size(decode_pages):
    check_triton(0.5, None, decode_pages)
    check_triton(None, 0.3, decode_pages)
