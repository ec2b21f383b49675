"""`raas_kernels.page_logit_bounds`: the torch engine against loops, the Triton kernel against the torch engine."""

import pytest
import torch

from raas_kernels import attend, key_states, page_extremes, page_logit_bounds

from . import by_hand
from .helpers import CODES, DEVICE, TOLERANCE, copied, exact, make_kv, reference, relative_error, triton_engine


fused = triton_engine()


def check(group, dtype, softcap=None, rows=None, bounds=True, **shape):
    kv = make_kv(dtype=dtype, bounds=bounds, **shape)
    batch = len(kv.bias) if rows is None else len(rows)
    query = torch.randn(batch, kv.bias.shape[1] * group, 1, shape["dk"], dtype=dtype, device=DEVICE)
    found = fused.page_logit_bounds(kv, query, 0.3, softcap, rows)
    expected = reference.page_logit_bounds(exact(kv), query.double(), 0.3, softcap, rows)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dk", [64, 80, 96, 128, 256])
def test_triton(dk, dtype):
    check(group=3, page_size=8, dk=dk, dtype=dtype)
    check(group=3, page_size=8, dk=dk, dtype=dtype, softcap=2.0)


@pytest.mark.parametrize("rows", [None, [2, 0]])
@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("code", [None, torch.int8, torch.uint8], ids=str)
def test_triton_on_chosen_rows_of_a_callers_memory(code, bounds, rows):
    rows = None if rows is None else torch.tensor(rows, device=DEVICE)
    shape = {"batch": 3, "page_size": 4, "dk": 16, "code": code, "strided": True}
    check(group=2, dtype=torch.float32, bounds=bounds, rows=rows, **shape)


def test_triton_on_an_expanded_latent():
    """The latent has one head, whose bias serves all the expanded heads."""
    kv = make_kv(batch=2, heads=1, bounds=True)
    expanded = kv.with_contents(*torch.randn(2, 2, 4, kv.bias.shape[2], 16, device=DEVICE))
    query = torch.randn(2, 8, 1, 16, device=DEVICE)
    found, expected = (engine.page_logit_bounds(expanded, query, 0.3) for engine in (fused, reference))
    assert found.shape == (2, 4, kv.num_pages) and relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("bounds", [False, True])
def test_reference_against_loops(bounds, with_rows, softcap):
    kv = make_kv(batch=3, page_size=4, dk=6, dtype=torch.float64, bounds=bounds, strided=True)
    rows = torch.tensor([2, 0], device=DEVICE) if with_rows else None
    query = torch.randn(2 if with_rows else 3, 6, 1, 6, dtype=torch.float64, device=DEVICE)
    found, expected = (engine.page_logit_bounds(kv, query, 0.3, softcap, rows) for engine in (reference, by_hand))
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_bounds_of_codes_are_the_same_whether_kept_or_computed(code):
    kv = make_kv(batch=2, code=code)
    query = torch.randn(2, 6, 1, 16, device=DEVICE)
    computed = page_logit_bounds(kv, query, 0.3)
    kept = copied(kv)
    kept.key_min, kept.key_max = page_extremes(key_states(kv, torch.float32), kv.bias, kv.page_size)
    torch.testing.assert_close(page_logit_bounds(kept, query, 0.3), computed)


@pytest.mark.parametrize("code", [None, torch.uint8], ids=str)
def test_bounds_the_logits_of_every_token(code):
    kv = make_kv(batch=2, page_size=4, bounds=True, code=code)
    query = torch.randn(2, 6, 1, 16, device=DEVICE)
    bounds = page_logit_bounds(kv, query, 0.3)
    logits = (query.view(2, 2, 3, 16) @ key_states(kv, torch.float32).mT * 0.3 + kv.bias[:, :, None]).amax(2)
    assert (logits.unflatten(-1, (-1, 4)).amax(-1) <= bounds + 1e-5).all()
    _, scores = attend(kv, query, 0.3)
    assert (scores[bounds == float("-inf")] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dk", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("budget", [1024, 8192, 65536])
def test_at_size(budget, dk, dtype):
    check(group=4, page_size=16, dk=dk, dtype=dtype, batch=2, heads=4, pages=budget // 16, decode_pages=8)
