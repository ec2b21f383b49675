"""`PagedKV.blocks`: every operator on pages in shuffled blocks gives what it gives on rows with memory of their own."""

import dataclasses

import pytest
import torch

from raas_kernels import (
    append,
    attend,
    extend,
    key_states,
    page_extremes,
    page_logit_bounds,
    refresh_extremes,
    value_states,
)
from raas_kernels.contents import take_pages
from raas_kernels.ops.append.reference import append_in_graph
from raas_kernels.ops.attend.configs import Config
from raas_kernels.paged_kv import resident

from .helpers import (
    CODES,
    DEVICE,
    POOLED,
    assert_same,
    copied,
    in_blocks,
    in_rows,
    make_kv,
    mapped,
    reference,
    relative_error,
    same_bits,
    triton_engine,
)
from .test_append import make_token, spread_clocks
from .test_attend import choose_pages


fused = triton_engine()
STORED = [None, *CODES]
ENGINES = {"torch": reference, "triton": fused}


@pytest.fixture(params=[(False, None), (True, [2, 0]), (False, [1, 1, 2, 1])], ids=["all", "views", "repeated"])
def layout(request):
    """Whether keys and values are views of a caller's memory, and the rows: all, two of three, one several times."""
    strided, rows = request.param
    return strided, None if rows is None else torch.tensor(rows, device=DEVICE)


def both(strided=False, **shape):
    """A cache in blocks, and the same cache whose rows have memory of their own."""
    shape = {"batch": 3, "pages": 7, "page_size": 4, "dk": 16, "dv": 8, **shape}
    pooled = in_blocks(make_kv(**shape), strided=strided)
    return pooled, in_rows(pooled)


def draw_query(kv, rows, group=3):
    size = kv.keys.shape[-1] * (2 if kv.is_packed else 1)
    return torch.randn(len(kv.bias) if rows is None else len(rows), kv.bias.shape[1] * group, 1, size, device=DEVICE)


@pytest.mark.parametrize("code", STORED, ids=str)
def test_states_of_all_pages_and_of_chosen_pages(code, layout):
    strided, rows = layout
    pooled, _ = both(strided, code=code)
    plain = in_rows(pooled, missing=0)
    for states_of in (key_states, value_states):
        assert same_bits(states_of(pooled, torch.float32, rows), states_of(plain, torch.float32, rows))
    selected = choose_pages(plain, 5, 3 if rows is None else len(rows), holes=True)
    for name in POOLED:
        if getattr(plain, name) is not None:
            found = take_pages(getattr(pooled, name), rows, selected, 4, pooled.blocks)
            assert same_bits(found, take_pages(getattr(plain, name), rows, selected, 4)), name
    tokens = torch.arange(24, device=DEVICE)
    assert torch.equal(resident(pooled, tokens, rows), resident(plain, tokens, rows))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("pages_read", [None, 4])
@pytest.mark.parametrize("code", STORED, ids=str)
def test_attend(code, pages_read, engine, layout):
    strided, rows = layout
    pooled, plain = both(strided, code=code)
    query = draw_query(plain, rows)
    selected = None if pages_read is None else choose_pages(plain, pages_read, len(query), holes=True)
    before = copied(pooled)
    for options in ({}, {"softcap": 2.0, "page_score": "sum", "group_score": "mean"}):
        options |= {"selected": selected, "rows": rows}
        found = ENGINES[engine].attend(pooled, query, 0.3, **options)
        for ours, expected in zip(found, ENGINES[engine].attend(plain, query, 0.3, **options), strict=True):
            assert torch.equal(ours, expected)
    assert_same(pooled, before)


@pytest.mark.parametrize("page_size", [1, 8, 64])
@pytest.mark.parametrize("programs", [1, 264], ids=["whole", "slices"])
@pytest.mark.parametrize("code", STORED, ids=str)
def test_pages_smaller_and_larger_than_a_tile(code, programs, page_size, monkeypatch):
    from raas_kernels.ops.attend import triton

    monkeypatch.setattr(triton, "choose_config", lambda *shape: Config(16, programs=programs))
    pooled, plain = both(page_size=page_size, pages=40 if page_size == 1 else 5, decode_pages=4, code=code)
    query = draw_query(plain, None)
    for ours, expected in zip(fused.attend(pooled, query, 0.3), reference.attend(plain, query, 0.3), strict=True):
        assert relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize("code", STORED, ids=str)
def test_extend(code, layout):
    strided, rows = layout
    pooled, plain = both(strided, code=code)
    query = draw_query(plain, rows).expand(-1, -1, 3, -1).contiguous()
    positions = torch.arange(15, 18, device=DEVICE)
    found, expected = (extend(kv, query, positions, 0.3, rows=rows) for kv in (pooled, plain))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("code", STORED, ids=str)
def test_page_bounds(code, bounds, engine, layout):
    strided, rows = layout
    pooled, plain = both(strided, code=code, bounds=bounds)
    query = draw_query(plain, rows)
    found, expected = (ENGINES[engine].page_logit_bounds(kv, query, 0.3, None, rows) for kv in (pooled, plain))
    assert torch.equal(found, expected) and (found[..., -1] == float("-inf")).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("code", STORED, ids=str)
def test_show(code, bounds, strided, engine):
    """Layers in blocks, of two sizes, and a layer without blocks in one call."""
    pooled, plain = both(strided, code=code, bounds=bounds)
    expected, others = [in_rows(pooled) for _ in range(2)]
    larger, _ = both(strided, code=code, bounds=bounds, pages=9)
    larger_expected = in_rows(larger)
    for kv in (pooled, larger, expected, larger_expected, others):
        refresh_extremes(kv)  # the bounds of the codes
    for seed in range(3):
        visible = (torch.rand(3, 17, generator=torch.Generator().manual_seed(seed)) > 0.4).to(DEVICE)
        ENGINES[engine].show([pooled, larger, others], visible)
        reference.show([expected, larger_expected], visible)
        assert_same(in_rows(pooled), expected)
        assert_same(in_rows(larger), larger_expected)
        assert_same(others, expected)
    if bounds and code is None:
        for ours, right in zip(
            (pooled.key_min, pooled.key_max), page_extremes(plain.keys, pooled.bias, 4), strict=True
        ):
            assert torch.equal(ours, right)


APPENDS = {"torch": reference.append, "graph": append_in_graph, "triton": fused.append}


@pytest.mark.parametrize("engine", APPENDS)
@pytest.mark.parametrize(("strided", "chosen"), [(False, None), (True, [2, 0])])
@pytest.mark.parametrize("code", STORED, ids=str)
def test_append(code, strided, chosen, engine):
    """Pages are recycled in place, and no block changes that belongs to no page."""
    pooled, plain = both(strided, code=code, bounds=True, states=2, rows_differ=True, decode_pages=3)
    for kv in (pooled, plain):
        kv.evictable[:, -2] = True
        spread_clocks(kv)
    rows, before = None if chosen is None else torch.tensor(chosen, device=DEVICE), copied(pooled)
    for step in range(14):
        key, value = make_token(plain, rows)
        visible = torch.tensor([(step + row) % 4 > 0 for row in range(len(key))], device=DEVICE)
        key[~visible], value[~visible] = float("nan"), float("nan")
        APPENDS[engine](pooled, key, value, visible, rows, step % 5 == 0)
        APPENDS[engine](plain, key, value, visible, rows, step % 5 == 0)
        assert_same(in_rows(pooled), plain)
    assert torch.equal(pooled.blocks, before.blocks)
    kept = torch.ones(len(pooled.keys), dtype=torch.bool, device=DEVICE)
    kept[pooled.blocks[slice(None) if rows is None else rows].flatten().long()] = False
    kept[0] = True
    for name in POOLED:
        if getattr(pooled, name) is not None:
            ours, old = (t.view(torch.int8)[kept] if t.element_size() == 1 else t[kept]
                         for t in (getattr(pooled, name), getattr(before, name)))  # fmt: skip
            assert same_bits(ours, old), name


@pytest.mark.parametrize("engine", APPENDS)
@pytest.mark.parametrize("has_memory", [False, True])
@pytest.mark.parametrize("code", STORED, ids=str)
def test_a_spare_row_that_a_call_names_several_times_touches_no_other(code, has_memory, engine):
    """A CUDA graph has a fixed number of rows: it fills up with one row that no request has."""
    pooled, _ = both(code=code, bounds=True, states=1)
    if not has_memory:
        pooled.blocks[1], pooled.evictable[1], pooled.bias[1] = 0, False, float("-inf")
        for name in POOLED:
            if getattr(pooled, name) is not None:
                getattr(pooled, name).view(torch.uint8)[0] = 0  # such a row reads block 0
    alone, before = copied(pooled), copied(pooled)
    rows = torch.tensor([1, 2, 1, 1], device=DEVICE)
    for _ in range(11):
        key, value = make_token(pooled, rows)
        APPENDS[engine](pooled, key, value, None, rows, False)
        APPENDS[engine](alone, key[1:2], value[1:2], None, rows[1:2], False)
        query = draw_query(pooled, rows)
        output, scores = attend(pooled, query, 0.3, rows=rows)
        expected = attend(alone, query[1:2], 0.3, rows=rows[1:2])
        assert torch.equal(output[1:2], expected[0]) and torch.equal(scores[1:2], expected[1])
        assert output.isfinite().all()
    ours, theirs, old = in_rows(pooled), in_rows(alone), in_rows(before)
    for field in dataclasses.fields(ours):
        if torch.is_tensor(getattr(ours, field.name)):
            mine, right, was = (getattr(kv, field.name) for kv in (ours, theirs, old))
            assert same_bits(mine[2], right[2]) and same_bits(mine[0], was[0]), field.name
    assert same_bits(pooled.values[0], before.values[0]), "block 0 holds nothing"


def test_two_rows_that_share_a_block_read_the_same():
    pooled, _ = both(bounds=True)
    for name in ("bias", "positions", "priority", "key_min", "key_max", "open_slot", "clock"):
        getattr(pooled, name)[1] = getattr(pooled, name)[0]
    pooled.blocks[1] = pooled.blocks[0]
    query = draw_query(pooled, None)
    query[1] = query[0]
    for engine in ENGINES.values():
        output, scores = engine.attend(pooled, query, 0.3)
        assert torch.equal(output[0], output[1]) and torch.equal(scores[0], scores[1])


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_step_in_blocks_compiles_to_one_graph(backend):
    pooled, plain = both(bounds=True, states=1)
    rows = torch.tensor([2, 0], device=DEVICE)

    def step(kv, key, value, query):
        append(kv, key, value, rows=rows)
        return attend(kv, query, 0.3, rows=rows)[0] + page_logit_bounds(kv, query, 0.3, rows=rows).max()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(9):
        (key, value), query = make_token(plain, rows), draw_query(plain, rows)
        torch.testing.assert_close(compiled(pooled, key, value, query), step(plain, key, value, query))
    now = in_rows(pooled)
    mapped(now, lambda name, tensor: torch.testing.assert_close(tensor, getattr(plain, name)))
