"""`PageTable` without a model: limits of each row, growth, counts, rows."""

from itertools import chain

import numpy as np
import pytest
import torch

from raas_cache.engine.hide import hide_decoded, hide_newest
from raas_cache.engine.page_table import FIRST_TOKENS, UNLIMITED
from raas_cache.engine.prefill import write_prefill
from raas_cache.engine.summaries import mean_keys, value_range
from raas_cache.methods.dense import DensePolicy
from raas_cache.methods.h2o import H2OPolicy

from .tables import (
    HEADS,
    KEY_SIZE,
    PAGE,
    VALUE_SIZE,
    Tokens,
    assert_consistent,
    assert_same,
    decode,
    make_table,
    pages,
    prefill,
    rows_of,
    snapshot,
)


@pytest.fixture
def tokens():
    return Tokens()


def test_nothing_is_held_before_the_first_prefill(tokens):
    table = make_table(3, tokens)
    assert table.num_pages == table.length == 0 and table.is_empty and not table.is_decoding
    assert table.counts.hold_nothing.all() and table.evicted.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("prompt", "limits"), [("pin", [5, 4, 2, 2]), ("select", [5, 4, 3, 3]), ("evict", [5, 5, 5, 5])]
)
def test_each_row_has_the_limit_of_its_own_prompt(tokens, prompt, limits):
    """Budget 6 pages; prompts of 1, 2, 4 and 5 pages, the least are 2 decode pages."""
    table = make_table(4, tokens, prompt=prompt)
    prefill(table, tokens, 5 * PAGE, hidden=[4 * PAGE + 2, 3 * PAGE, PAGE, 0])
    assert table.counts.limit.tolist() == limits
    if prompt != "evict":  # evicted prefill is ranked first
        assert table.counts.pinned_pages.tolist() == [1, 2, 4, 5]
        assert table.kv.evictable.sum(1).tolist() == limits
    assert_consistent(table)


def test_a_policy_that_never_evicts_has_no_limit(tokens):
    table = make_table(2, tokens, policy=DensePolicy())
    prefill(table, tokens, 3 * PAGE, hidden=[PAGE, 0])
    assert table.counts.limit.tolist() == [UNLIMITED] * 2
    decode(table, tokens, 50 * PAGE)
    assert table.evicted.tolist() == [0, 0] and (table.kv.bias == 0).sum(2).tolist() == [
        [52 * PAGE] * 2,
        [53 * PAGE] * 2,
    ]


def test_pages_grow_as_rows_need_them(tokens):
    """A row with a longer prompt has fewer evictable pages, and a row that decodes nothing needs none."""
    table = make_table(2, tokens, budget=80 * PAGE)
    prefill(table, tokens, 20 * PAGE, hidden=[19 * PAGE, 0])
    first = FIRST_TOKENS // PAGE
    assert table.num_pages == 20 + first
    sizes = set()
    for _ in range(90 * PAGE):
        decode(table, tokens, rows=rows_of(0))
        sizes.add(table.num_pages)
        assert_consistent(table) if table.counts.decoded[0] % 64 == 0 else None
    assert max(sizes) == 80 and len(sizes) <= 4
    assert table.evicted.tolist() == [90 - 79, 0] and table.counts.decoded.tolist() == [90 * PAGE, 0]
    assert table.counts.limit.tolist() == [79, 60]
    assert sum(map(len, pages(table, 1))) == 20 * PAGE


def test_growth_keeps_what_is_held(tokens):
    table = make_table(2, tokens, budget=80 * PAGE, policy=H2OPolicy())
    prefill(table, tokens, 7)
    before = snapshot(decode(table, tokens, 9))
    table.set_pages(table.num_pages + 5)
    assert table.num_pages == before.num_pages + 5
    assert_same(table, before)
    assert_consistent(table)


def test_preallocation_makes_room_for_every_row(tokens):
    table = make_table(2, tokens, budget=80 * PAGE)
    table.preallocates = True
    prefill(table, tokens, 20 * PAGE, hidden=[19 * PAGE, 0])
    assert table.num_pages == 80 and table.is_full_size


def test_a_compiled_step_needs_all_pages(tokens, monkeypatch):
    table = make_table(1, tokens, budget=80 * PAGE)
    prefill(table, tokens, 7)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"call cache\.preallocate"):
        table.before_decode()


def test_counts_follow_the_clock_of_compiled_steps(tokens, monkeypatch):
    table = make_table(3, tokens)
    prefill(table, tokens, 2 * PAGE, hidden=[5, 0, 2])
    decode(table, tokens, 5, rows_of(1))
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        table.before_decode()
    table.kv.clock += 1  # what the operator does
    assert table.counts.seen.tolist() == [9, 14, 9] and table.counts.decoded.tolist() == [1, 6, 1]
    decode(table, tokens, 2)
    assert table.counts.decoded.tolist() == [3, 8, 3]
    assert_consistent(table)


def test_steps_between_openings_are_counted(tokens):
    """The host counts them when somebody asks."""
    table = make_table(2, tokens)
    prefill(table, tokens, 3)
    for step in range(1, 40):
        decode(table, tokens)
        if step % 7 == 0:
            assert table.counts.decoded.tolist() == [step, step] and table.length == 3 + step
    assert table.evicted.tolist() == [5, 5] and table.opened.tolist() == [10, 10]


def test_evicted_pages_of_rows_that_differ(tokens):
    table = make_table(3, tokens)
    prefill(table, tokens, 4 * PAGE, hidden=[3 * PAGE, 0, 2 * PAGE])
    decode(table, tokens, 3 * PAGE, rows_of(2))
    decode(table, tokens, 4 * PAGE)
    assert table.evicted.tolist() == [0, 2, 3]
    assert_consistent(table)


def test_release_rows(tokens):
    table = make_table(3, tokens, scoring="minmax", policy=H2OPolicy())
    prefill(table, tokens, 2 * PAGE, hidden=[1, 0, 0])
    decode(table, tokens, 7)
    table.kv.keys[1, :, 3] = float("nan")
    before = snapshot(table)
    table.release_rows(rows_of(1))
    assert_same(table, before, rows=[0, 2])
    assert table.counts.hold_nothing.tolist() == [False, True, False] and table.counts.limit[1] == 0
    assert not any(pages(table, 1)) and (table.kv.clock[1] == -1).all()
    assert table.kv.keys.isfinite().all(), "attention would multiply it by 0"
    assert table.length_of(rows_of(1)) == 0 and table.length == 15
    decode(table, tokens, 3 * PAGE)
    assert table.evicted[1] == 0
    table.release_rows(rows_of(1))
    prefill(table, tokens, 5, rows_of(1))
    assert pages(table, 1)[:2] == [[0, 1, 2, 3], [4]]
    assert_consistent(table)


def test_rows_are_moved_with_their_counts(tokens):
    table = make_table(3, tokens, policy=H2OPolicy(), scoring="minmax")
    prefill(table, tokens, 4 * PAGE, hidden=[3 * PAGE, 0, 5])
    decode(table, tokens, 3 * PAGE + 1, rows_of(2))
    decode(table, tokens, 2)
    before = snapshot(table)
    for index in ([2, 0, 0], [1, 2], [0, 1, 1, 0]):
        table = snapshot(before)
        table.apply_to_rows(lambda state, index=index: state[torch.tensor(index)])
        assert table.batch_size == len(index)
        for new, old in enumerate(index):
            for name in (
                "keys",
                "bias",
                "positions",
                "priority",
                "evictable",
                "open_slot",
                "clock",
                "key_min",
                "states",
            ):
                assert torch.equal(getattr(table.kv, name)[new], getattr(before.kv, name)[old]), name
            for name, counts in vars(before.counts).items():
                assert np.array_equal(getattr(table.counts, name)[new], counts[old]), name
        assert_consistent(table)
        decode(table, tokens, 5 * PAGE)
        assert_consistent(table)


@pytest.mark.parametrize("rows", [None, (2, 0)])
def test_hide_the_newest(tokens, rows):
    """Of a prefill, which goes on in a page and in a new one, and of a decode token."""
    touched = None if rows is None else rows_of(*rows)
    names = (0, 1, 2) if rows is None else rows
    table = make_table(3, tokens, scoring="minmax")
    prefill(table, tokens, 6)
    prefill(table, tokens, 4, touched)
    visible = torch.tensor([[True, False, True, False]] * len(names))
    visible[-1] = True
    hide_newest(table, visible, touched)
    expected = {row: [0, 1, 2, 3, 4, 5] for row in range(3)}
    for row in names:
        expected[row] = [*expected[row], 6, 8] if row != names[-1] else [*expected[row], 6, 7, 8, 9]
    assert {row: [*chain(*pages(table, row))] for row in range(3)} == expected
    decode(table, tokens, rows=touched)
    hide_decoded(table, torch.tensor([False] + [True] * (len(names) - 1)), touched)
    for row in names[1:]:
        expected[row].append(10)
    assert {row: [*chain(*pages(table, row))] for row in range(3)} == expected
    low = table.kv.keys.masked_fill((table.kv.bias != 0)[..., None], float("inf")).unflatten(2, (-1, PAGE)).amin(3)
    pinned = torch.from_numpy(table.counts.pinned)[:, None, :, None].expand_as(low)
    assert torch.equal(table.kv.key_min[pinned], low[pinned])


def test_another_input_is_refused(tokens):
    table = make_table(2, tokens)
    prefill(table, tokens, 3)
    key, value = tokens(2, 1)
    table.check_same_use(key, value, None)
    table.check_same_use(key[:1], value[:1], rows_of(1))
    for given, rows, says in (
        ((key[:1], value[:1]), None, "holds 3 tokens with batch size 2, but the new keys have batch size 1"),
        ((key, value), rows_of(0), "batch size 1, but the new keys have batch size 2"),
        ((key[:, :1], value[:, :1]), None, f"KV heads {HEADS}"),
        ((key[..., :2], value), None, f"head size {KEY_SIZE}"),
        ((key, value[..., :2]), None, f"head size of values {VALUE_SIZE}"),
        ((key.float(), value), None, "dtype torch.float64"),
        ((key, value.float()), None, "dtype of values"),
        ((key.to("meta"), value.to("meta")), None, "device cpu"),
    ):
        with pytest.raises(ValueError, match=says):
            table.check_same_use(*given, rows)


def test_summaries_and_states(tokens):
    table = make_table(1, tokens)
    key, value = tokens(1, 6)
    write_prefill(table, key, value, torch.tensor([[True] * 5 + [False]]), [0])
    means = mean_keys(table)
    torch.testing.assert_close(means[:, :, 0], key[:, :, :4].mean(2))
    torch.testing.assert_close(means[:, :, 1], key[:, :, 4])
    assert (means[:, :, 2:] == 0).all()
    ranges, expected = value_range(table), value.amax(-1) - value.amin(-1)
    torch.testing.assert_close(ranges[:, :, 0], expected[:, :, :4].amax(2))
    torch.testing.assert_close(ranges[:, :, 1], expected[:, :, 4])
    assert (ranges[:, :, 2:] == 0).all()
    assert torch.equal(table.states()[0][:, :, :6], key) and torch.equal(table.states()[1][:, :, :6], value)
