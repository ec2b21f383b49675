"""`raas_kernels.append`: the torch engine against loops, the Triton kernel against the torch engine, bit for bit."""

import pytest
import torch

from raas_kernels import victim
from raas_kernels.ops.append.reference import append_in_graph

from . import by_hand
from .helpers import CODES, DEVICE, TOLERANCE, assert_same, copied, make_kv, reference, rows_of, triton_engine


fused = triton_engine()


def make_token(kv, rows=None):
    """Key and value as a model gives them: one token's heads side by side, so that pairs are not contiguous."""
    batch = len(kv.bias) if rows is None else len(rows)
    keys = kv.keys if kv.open_keys is None else kv.open_keys
    dtype = keys.dtype if kv.key_scales is None else torch.float32
    sizes = keys.shape[-1], kv.value_size
    return [torch.randn(batch, 1, kv.bias.shape[1], size, dtype=dtype, device=DEVICE).transpose(1, 2) for size in sizes]


def spread_clocks(kv):
    """Give every row and KV head tokens of its own behind it."""
    batch, heads = kv.clock.shape[:2]
    kv.clock += torch.arange(batch * heads, device=DEVICE).view(batch, heads, 1) * 3


def check_engines(steps, dtype=torch.float32, padded=False, in_step=True, may_close=False, rows=None, **shape):
    kv = make_kv(page_size=4, dk=80, dv=64, dtype=dtype, **shape) if "page_size" not in shape else make_kv(
        dtype=dtype, **shape
    )  # fmt: skip
    kv.clock[:] = torch.tensor([999, -1], device=DEVICE)
    if not in_step:
        spread_clocks(kv)
    ours, theirs = copied(kv), copied(kv)
    for step in range(steps):
        key, value = make_token(kv, rows)
        visible = None
        if padded:  # the K and V of padding may be anything
            visible = torch.tensor([(step + row) % 3 > 0 for row in range(len(key))], device=DEVICE)
            key[~visible], value[~visible] = float("nan"), float("nan")
        for state, engine in ((theirs, reference), (ours, fused)):
            engine.append(state, key, value, visible, rows, may_close)
    assert_same(ours, theirs)
    return ours


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bounds", [False, True])
def test_triton(dtype, bounds):
    check_engines(steps=30, dtype=dtype, bounds=bounds, padded=bounds)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("code", CODES, ids=str)
def test_triton_writes_codes(code, dtype):
    check_engines(steps=30, dtype=dtype, bounds=True, code=code, padded=True)


@pytest.mark.parametrize("may_close", [False, True])
@pytest.mark.parametrize("bounds", [False, True])
def test_triton_on_rows_that_are_not_in_step(bounds, may_close):
    """Each row and head goes by its own clock: where it is in its page, when it opens one, and which it recycles."""
    shape = {"batch": 2, "page_size": 4, "dk": 16, "dv": 8}
    check_engines(steps=11, **shape, bounds=bounds, may_close=may_close, in_step=False, padded=True)


@pytest.mark.parametrize("code", [None, *CODES], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_triton_on_chosen_rows_of_a_callers_memory(strided, code):
    """Rows 2 and 0 of three, with pages of their own to evict, numbers of the policy, in views of a larger buffer."""
    rows = torch.tensor([2, 0], device=DEVICE)
    shape = {"batch": 3, "page_size": 4, "dk": 16, "dv": 8, "pages": 7, "code": code, "bounds": True, "states": 3}
    check_engines(
        steps=13, **shape, rows=rows, in_step=False, padded=True, strided=strided, rows_differ=True, decode_pages=1
    )


def test_triton_compares_pages_in_blocks(monkeypatch):
    """More pages than one block: the smallest priority, then the oldest page, wherever they are."""
    from raas_kernels.ops.append import triton

    monkeypatch.setattr(triton, "MAX_BLOCK_PAGES", 4)
    shape = {"page_size": 1, "dk": 16, "dv": 16, "heads": 1, "pages": 23, "decode_pages": 19}
    check_engines(steps=40, **shape, rows_differ=True)


@pytest.mark.parametrize("engine", ["torch", "graph", "triton"])
@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("code", [None, torch.uint8], ids=str)
def test_against_loops(code, engine, in_step, with_rows, strided):
    """In float64 for the torch engine: everything that append writes, in every row, after pages were recycled."""
    append = {"torch": reference.append, "graph": append_in_graph, "triton": fused.append}[engine]
    dtype = torch.float32 if engine == "triton" else torch.float64
    kv = make_kv(
        batch=3, pages=6, page_size=4, dk=8, dv=6, dtype=dtype, bounds=True, states=2, strided=strided,
        rows_differ=True, decode_pages=1, code=code,
    )  # fmt: skip
    if not in_step:
        spread_clocks(kv)
    rows = torch.tensor([2, 0], device=DEVICE) if with_rows else None
    expected, before = copied(kv), copied(kv)
    for step in range(14):
        key, value = make_token(kv, rows)
        visible = torch.tensor([(step + row) % 4 > 0 for row in range(len(key))], device=DEVICE)
        may_close = step % 5 == 0
        append(kv, key, value, visible, rows, may_close)
        by_hand.append(expected, key, value, visible, rows, may_close)
        assert_same(kv, expected)
    if with_rows:
        assert_same(rows_of(kv, slice(1, 2)), rows_of(before, slice(1, 2)))


@pytest.mark.parametrize("shape", [{}, {"bounds": True}, {"code": torch.uint8}], ids=str)
def test_rows_that_are_not_in_step_get_what_each_gets_alone(shape):
    kv = make_kv(batch=3, page_size=4, dk=8, dv=8, **shape)
    kv.clock[:] = torch.tensor([[[40, 0]] * 2, [[7, 2]] * 2, [[99, 5]] * 2], device=DEVICE)
    alone = [rows_of(copied(kv), slice(row, row + 1)) for row in range(3)]
    for _ in range(9):
        key, value = make_token(kv)
        reference.append(kv, key, value)
        for row in range(3):
            one = slice(row, row + 1)
            reference.append(alone[row], key[one], value[one])
    for row in range(3):
        assert_same(rows_of(kv, slice(row, row + 1)), alone[row])


def test_rows_of_different_prompts_share_the_quick_path(monkeypatch):
    """Rows with the same number of decode tokens, behind prompts of different length, are appended to in step."""
    from raas_kernels.ops.append import reference as module

    kv = make_kv(batch=3, page_size=4, dk=8, dv=8, dtype=torch.float64, bounds=True, states=1)
    kv.clock[..., 0] += torch.tensor([[0], [4], [9]], device=DEVICE)
    expected = copied(kv)
    monkeypatch.setattr(module, "append_in_graph", None)
    for _ in range(9):
        key, value = make_token(kv)
        reference.append(kv, key, value)
        by_hand.append(expected, key, value)
    assert_same(kv, expected)


@pytest.mark.parametrize("rows", [None, [3, 1]])
def test_victim_is_the_smallest_priority_then_the_oldest(rows):
    kv = make_kv(batch=4, pages=9, rows_differ=True, decode_pages=1)
    kv.positions[:] = torch.stack([torch.randperm(72) for _ in range(8)]).view(4, 2, 72)
    kv.priority[...] = (torch.rand(4, 2, 9) * 3).round()  # ties are common
    found = victim(kv, None if rows is None else torch.tensor(rows, device=DEVICE)).tolist()
    expected = [[by_hand.victim(kv, row, head) for head in range(2)] for row in (rows or range(4))]
    assert found == expected


def test_victim_of_a_row_whose_pages_all_have_infinite_priority_is_evictable():
    kv = make_kv()
    kv.priority[:] = float("inf")
    assert victim(kv).tolist() == [[by_hand.victim(kv, 0, head) for head in range(2)]]
    ours, theirs = copied(kv), copied(kv)
    ours.clock[..., 1] = theirs.clock[..., 1] = kv.page_size - 1
    key, value = make_token(kv)
    reference.append(theirs, key, value)
    fused.append(ours, key, value)
    assert_same(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("decode_pages", [64, 4096])
def test_triton_at_size(decode_pages, dtype):
    shape = {"page_size": 16, "dk": 128, "dv": 128, "batch": 4, "heads": 4}
    shape |= {"pages": decode_pages + 8, "decode_pages": decode_pages, "bounds": True, "dtype": dtype}
    check_engines(steps=200, **shape)
    for code in CODES:
        check_engines(steps=40, **shape, code=code)
