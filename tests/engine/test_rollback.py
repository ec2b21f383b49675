"""Rollback without a model: undoing a decode step or a prefill restores the table exactly."""

import numpy as np
import pytest
import torch

from raas_cache.engine.rollback import DecodeNote, PrefillNote, Rollback
from raas_cache.methods.h2o import H2OPolicy

from .tables import PAGE, Tokens, assert_consistent, assert_same, decode, make_table, pages, prefill, rows_of, snapshot


@pytest.fixture
def tokens():
    return Tokens()


def no_attention(query, softmax):
    raise AssertionError("no query was noted")


def begun(tokens, decoded, batch=2, **more):
    """A table of two rows of different prompts after `decoded` decode steps."""
    table = make_table(batch, tokens, **{"policy": H2OPolicy(), "scoring": "minmax", **more})
    prefill(table, tokens, 7, hidden=[4, 0][:batch])
    return decode(table, tokens, decoded)


def noted_steps(table, tokens, rollback, steps):
    """Decode steps that are noted; a policy changes priorities and states after each."""
    for _ in range(steps):
        rollback.note(DecodeNote.before(table, 1))
        decode(table, tokens)
        touched = table.kv.priority > float("-inf")
        table.kv.priority[touched] += torch.rand(int(touched.sum()), dtype=torch.float64, generator=tokens.generator)
        table.kv.states += 1


@pytest.mark.parametrize("decoded", [0, 1, PAGE - 1, PAGE, 5 * PAGE, 9 * PAGE + 2])
@pytest.mark.parametrize("steps", [1, 2, PAGE, 3 * PAGE + 1])
def test_decode_steps(tokens, decoded, steps):
    """Within a page, when one is opened, when one is recycled."""
    table, rollback = begun(tokens, decoded), Rollback(100)
    before = snapshot(table)
    noted_steps(table, tokens, rollback, steps)
    rollback.undo(table, steps, no_attention)
    assert_same(table, before)
    assert not rollback.notes
    assert_consistent(table)


@pytest.mark.parametrize("kept", [1, PAGE])
def test_only_the_last_steps(tokens, kept):
    table, rollback = begun(tokens, 9 * PAGE), Rollback(100)
    noted_steps(table, tokens, rollback, kept)
    before = snapshot(table)
    noted_steps(table, tokens, rollback, PAGE + 1)
    assert rollback.removable(table) == kept + PAGE + 1
    rollback.undo(table, PAGE + 1, no_attention)
    assert_same(table, before)
    assert rollback.removable(table) == 0


def test_what_follows_is_as_if_nothing_had_come(tokens):
    table, rollback = begun(tokens, 5 * PAGE + 1), Rollback(100)
    plain = snapshot(table)
    noted_steps(table, tokens, rollback, 2 * PAGE)
    rollback.undo(table, 2 * PAGE, no_attention)
    decode(table, Tokens(7), 20), decode(plain, Tokens(7), 20)
    assert_same(table, plain)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("decoded", [8 * PAGE, 8 * PAGE + 3])
@pytest.mark.parametrize("steps", [1, 2, PAGE + 2])
def test_codes(tokens, steps, decoded, kv_dtype):
    """A draft also closes a page: its keys are coded, and exact again when they are taken back."""
    table, rollback = begun(tokens, decoded, kv_dtype=kv_dtype), Rollback(100)
    before = snapshot(table)
    noted_steps(table, tokens, rollback, steps)
    rollback.undo(table, steps, no_attention)
    assert_same(table, before)
    decode(table, Tokens(7), 2 * PAGE), decode(before, Tokens(7), 2 * PAGE)
    assert_same(table, before)


def test_growth_is_undone_but_for_the_memory(tokens):
    table, rollback = make_table(1, tokens, budget=80 * PAGE, policy=H2OPolicy(), scoring="minmax"), Rollback(500)
    prefill(table, tokens, 7)
    decode(table, tokens, 31 * PAGE + 1)
    before = snapshot(table)
    noted_steps(table, tokens, rollback, 3 * PAGE)
    assert table.num_pages > before.num_pages
    rollback.undo(table, 3 * PAGE, no_attention)
    assert_same(table, before)
    assert_consistent(table)


@pytest.mark.parametrize("decoded", [0, 1, PAGE, 9 * PAGE + 2])
@pytest.mark.parametrize("length", [1, 6, 13])
@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_a_prefill(tokens, kv_dtype, decoded, length):
    """Also into a page of 4-bit codes, which it codes again."""
    table, rollback = begun(tokens, decoded, kv_dtype=kv_dtype), Rollback(100)
    before = snapshot(table)
    rollback.note(PrefillNote.before(table, length))
    prefill(table, tokens, length)
    if table.is_decoding:
        table.kv.priority.masked_fill_(table.kv.held, 99.0)
        table.kv.states += 1
    rollback.undo(table, length, no_attention)
    assert_same(table, before)
    assert table.num_pages == before.num_pages
    assert_consistent(table)


def test_part_of_a_prefill_gives_its_stamps_again(tokens):
    """The first three of nine tokens stay, and their queries are asked once more."""
    asked, table, rollback = [], begun(tokens, 6), Rollback(100)
    plain = snapshot(table)
    rollback.note(PrefillNote.before(table, 9))
    prefill(table, tokens, 9)
    query = torch.arange(9.0).view(1, 1, 9, 1).expand(2, 4, -1, 8)
    rollback.note_read(query, {"scale": 1.0})
    rollback.note_read(query[:, :, -1:], {"scale": 1.0})  # another reader's: not of the whole forward
    rollback.undo(table, 6, lambda query, softmax: asked.append(query))
    assert len(asked) == 1 and torch.equal(asked[0], query[:, :, :3])
    assert table.counts.seen.tolist() == [16, 16] and table.counts.prefilled.tolist() == [6, 10]
    prefill(plain, Tokens(), 3)
    assert [pages(table, row) for row in range(2)] == [pages(plain, row) for row in range(2)]
    assert_consistent(table)


def test_a_turn_and_steps_behind_it(tokens):
    table, rollback = begun(tokens, 6 * PAGE + 3), Rollback(100)
    before = snapshot(table)
    noted_steps(table, tokens, rollback, 3)
    rollback.note(PrefillNote.before(table, 6))
    prefill(table, tokens, 6)
    noted_steps(table, tokens, rollback, PAGE + 1)
    assert rollback.removable(table) == 3 + 6 + PAGE + 1
    rollback.undo(table, 3 + 6 + PAGE + 1, no_attention)
    assert_same(table, before)
    assert_consistent(table)


def test_the_oldest_notes_go(tokens):
    table, rollback = begun(tokens, 9 * PAGE), Rollback(5)
    noted_steps(table, tokens, rollback, 8)
    assert len(rollback.notes) == rollback.removable(table) == 5


def test_prefill_alone_needs_no_notes(tokens):
    table, rollback = begun(tokens, 0), Rollback(100)
    assert rollback.removable(table) == 7
    rollback.undo(table, 5, no_attention)
    assert table.counts.seen.tolist() == [2, 2] and table.counts.prefilled.tolist() == [0, 2]
    evicting = make_table(1, tokens, prompt="evict")
    prefill(evicting, tokens, 5)
    assert Rollback(100).removable(evicting) == 0


@pytest.mark.parametrize("index", [[1, 0], [0, 0], [1]])
@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_notes_move_with_their_rows(tokens, kv_dtype, index):
    """Rows change places between a step and its undoing."""

    def function(state):
        return state[torch.tensor(index)]

    table, rollback = begun(tokens, 8 * PAGE - 1, kv_dtype=kv_dtype), Rollback(100)
    before = snapshot(table)
    noted_steps(table, tokens, rollback, 2)
    rollback.note(PrefillNote.before(table, 6))
    prefill(table, tokens, 6)
    noted_steps(table, tokens, rollback, PAGE)
    for moved in (table, rollback, before):
        moved.apply_to_rows(function)
    rollback.undo(table, 2 + 6 + PAGE, no_attention)
    assert_same(table, before)
    assert_consistent(table)


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_rows_at_different_decode_steps(tokens, kv_dtype):
    """Rows that were admitted one after the other, then stepped and taken back together."""
    table, rollback = begun(tokens, 0, kv_dtype=kv_dtype), Rollback(100)
    decode(table, tokens, 3, rows_of(1))
    decode(table, tokens, 5 * PAGE)
    before = snapshot(table)
    assert not np.array_equal(*before.counts.decoded.reshape(2, 1))
    noted_steps(table, tokens, rollback, 2 * PAGE + 1)
    rollback.undo(table, 2 * PAGE + 1, no_attention)
    assert_same(table, before)
    assert_consistent(table)
