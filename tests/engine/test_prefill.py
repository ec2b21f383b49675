"""Prefill without a model: which slot each token gets, row by row, and how prefill competes for the budget."""

from itertools import chain

import numpy as np
import pytest
import torch

from raas_cache.engine.page_table import PageTable
from raas_cache.engine.prefill import Places, truncate, write_prefill
from raas_cache.engine.prefill_eviction import enter_competition, keep_best

from .tables import PAGE, Tokens, assert_consistent, assert_same, decode, make_table, pages, prefill, rows_of, snapshot


@pytest.fixture
def tokens():
    return Tokens()


def held(table, row, head=0):
    return [page for page in pages(table, row, head) if page]


def by_slot(table, row):
    """`{slot: position}` of one KV head."""
    positions = table.kv.positions[row, 0].masked_fill(table.kv.bias[row, 0] != 0, -1).tolist()
    return {slot: position for slot, position in enumerate(positions) if position >= 0}


def test_fresh_rows_begin_at_page_0_without_their_padding(tokens):
    table = make_table(3, tokens)
    places = prefill(table, tokens, 9, hidden=[0, 3, 9])
    assert [held(table, row) for row in range(3)] == [
        [[0, 1, 2, 3], [4, 5, 6, 7], [8]],
        [[3, 4, 5, 6], [7, 8]],
        [],
    ]
    assert places.begins.tolist() == [True, True, False] and places.stored.tolist() == [9, 6, 0]
    counts = table.counts
    assert counts.pinned_pages.tolist() == [3, 2, 0] and counts.padding.tolist() == [0, 3, 9]
    assert counts.prefilled.tolist() == [9, 6, 0] and counts.seen.tolist() == [9, 9, 9]
    assert_consistent(table)


def test_a_prefill_lays_out_once(tokens, monkeypatch):
    calls, lay_out = [], PageTable.lay_out
    monkeypatch.setattr(PageTable, "lay_out", lambda table: calls.append(table) or lay_out(table))
    table = make_table(3, tokens)
    calls.clear()
    for new in (9, 30):
        prefill(table, tokens, new)
        assert_consistent(table)
    assert len(calls) == 2


def test_a_chunk_fills_the_rest_of_a_page_first(tokens):
    """Also behind a chunk that was padding only, and behind hidden tokens that are no left padding."""
    table = make_table(3, tokens)
    prefill(table, tokens, 6, hidden=[0, 1, 6])
    places = prefill(table, tokens, 5, hidden=[2, 0, 1])
    assert held(table, 0) == [[0, 1, 2, 3], [4, 5], [8, 9, 10]], "hidden tokens have their slots"
    assert held(table, 1) == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert held(table, 2) == [[7, 8, 9, 10]]
    assert places.dropped.tolist() == [0, 0, 1] and places.room.tolist() == [2, 3, 0]
    assert by_slot(table, 2) == dict(enumerate(range(7, 11)))


@pytest.mark.parametrize("chunks", [[2 * PAGE, PAGE + 1], [PAGE - 1, PAGE, PAGE + 2], [1] * 13])
def test_chunks_of_4_bit_pages(tokens, chunks):
    """A page that gets more tokens is coded again; each time, a key moves by at most half a step of its channel."""
    whole, chunked = (make_table(2, tokens, kv_dtype="int4") for _ in range(2))
    key, value = tokens(2, 3 * PAGE + 1)
    visible = torch.arange(3 * PAGE + 1) != 2
    visible = torch.stack([visible, torch.ones_like(visible)])
    write_prefill(whole, key, value, visible)
    for part in torch.arange(3 * PAGE + 1).split(chunks):
        write_prefill(chunked, key[:, :, part], value[:, :, part], visible[:, part])
    assert [pages(chunked, row) for row in range(2)] == [pages(whole, row) for row in range(2)]
    assert torch.equal(chunked.states()[1], whole.states()[1]), "values are coded by token"
    for name in ("key_min", "key_max"):
        torch.testing.assert_close(getattr(chunked.kv, name), getattr(whole.kv, name), rtol=1e-12, atol=1e-12)
    step = ((whole.kv.key_max - whole.kv.key_min) / 15).repeat_interleave(PAGE, 2)[:, :, : 3 * PAGE + 1]
    shown = visible[:, None].expand(-1, key.shape[1], -1)
    for table, times in ((whole, 1), (chunked, 1 if len(chunks) == 2 else PAGE)):
        error = (table.states()[0][:, :, : 3 * PAGE + 1] - key).abs()
        assert (error <= times * step / 2 + 1e-12)[shown].all() and (error > 0).any()


def test_rows_in_step_are_written_in_runs(tokens):
    """The same slots as with one write for each token."""
    for new in (1, 3, 4, 9):
        table = make_table(2, tokens)
        prefill(table, tokens, 6)
        places = Places(table, np.arange(2), new, np.zeros(2, np.int64))
        runs = {
            token: slot
            for of, to in places.segments
            for token, slot in zip(range(of.start, of.stop), range(to.start, to.stop), strict=True)
        }
        row, token, slot = places.pairs()
        assert dict(zip(token[row == 1].tolist(), slot[row == 1].tolist(), strict=True)) == runs
    assert Places(table, np.arange(2), 4, np.array([0, 1])).segments is not None, "no row is fresh"
    fresh = make_table(2, tokens)
    assert Places(fresh, np.arange(2), 4, np.array([0, 1])).segments is None


@pytest.mark.parametrize("decoded", [1, PAGE, PAGE + 3])
def test_a_turn_stands_behind_the_decode_pages(tokens, decoded):
    table = make_table(1, tokens)
    prefill(table, tokens, 6)
    decode(table, tokens, decoded)
    before, end = held(table, 0), table.num_pages
    prefill(table, tokens, 7)
    new = list(range(6 + decoded, 13 + decoded))
    assert held(table, 0) == [before[0], [*before[1], *new[:2]], *before[2:], new[2:6], new[6:]]
    assert list(table.counts.pinned[0].nonzero()[0]) == [0, 1, end, end + 1]
    decode(table, tokens)  # goes on in the open page, or opens the next one
    assert [13 + decoded] in held(table, 0) or any(page[-1] == 13 + decoded for page in held(table, 0))
    assert_consistent(table)


def test_an_open_page_expects_the_positions_behind_a_turn(tokens):
    table = make_table(2, tokens)
    prefill(table, tokens, 4)
    decode(table, tokens, 2, rows_of(0))
    decode(table, tokens, PAGE, rows_of(1))
    prefill(table, tokens, 3)
    decode(table, tokens, 2)
    assert [4, 5, 9, 10] in held(table, 0) and [11, 12] in held(table, 1)


def test_a_turn_of_rows_that_differ(tokens):
    """One has decoded nothing, one is mid-page, one has a page to the full; the fourth is not touched."""
    table = make_table(4, tokens)
    prefill(table, tokens, 6, hidden=[4, 0, 1, 0])
    decode(table, tokens, 3, rows_of(1))
    decode(table, tokens, PAGE, rows_of(3, 2))
    before, end = snapshot(table), table.num_pages
    prefill(table, tokens, 5, rows_of(2, 0, 1))
    assert_same(table, before, rows=[3])
    assert held(table, 0) == [[4, 5, 6, 7], [8, 9, 10]]
    assert held(table, 1) == [[0, 1, 2, 3], [4, 5, 9, 10], [6, 7, 8], [11, 12, 13]]
    assert held(table, 2) == [[1, 2, 3, 4], [5, 10, 11, 12], [6, 7, 8, 9], [13, 14]]
    pinned = table.counts.pinned
    assert [list(row.nonzero()[0]) for row in pinned] == [[0, 1], [0, 1, end], [0, 1, end], [0, 1]]
    assert_consistent(table)


def test_a_turn_takes_pages_that_another_row_brought(tokens):
    """Behind the pages that the row itself uses, so that the table does not grow with each turn of each row."""
    table = make_table(2, tokens)
    prefill(table, tokens, 5)
    decode(table, tokens, 6 * PAGE)
    prefill(table, tokens, 12, rows_of(0))
    grown = table.num_pages
    prefill(table, tokens, 12, rows_of(1))
    assert table.num_pages == grown
    for row in range(2):
        assert sum(map(len, held(table, row))) == 17 + 4 * PAGE
    table.release_rows(rows_of(1))
    prefill(table, tokens, 5, rows_of(1))
    decode(table, tokens, 5, rows_of(1))
    prefill(table, tokens, 12, rows_of(1))
    assert table.num_pages == grown and list(chain(*held(table, 1))) != []
    assert_consistent(table)


def test_a_fresh_row_beside_rows_that_decode(tokens):
    table = make_table(2, tokens)
    prefill(table, tokens, 5, rows_of(1))
    decode(table, tokens, 7 * PAGE, rows_of(1))
    before = snapshot(table)
    prefill(table, tokens, 15, rows_of(0))
    assert_same(table, before, rows=[1])
    assert held(table, 0) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14]]
    assert table.counts.limit.tolist() == [2, 4] and table.num_pages == 6
    assert_consistent(table)


def test_the_limit_is_settled_when_decoding_begins(tokens):
    table = make_table(2, tokens)
    prefill(table, tokens, 5)
    prefill(table, tokens, 5, rows_of(1))
    assert table.counts.limit.tolist() == [4, 3]
    decode(table, tokens, rows=rows_of(0))
    prefill(table, tokens, 8)
    assert table.counts.limit.tolist() == [4, 2]


def evict(table, tokens, new, rows=None, hidden=None, priority=None):
    """A prefill whose pages compete, with `priority(pages)` as what the policy says of them."""
    places = prefill(table, tokens, new, rows, hidden)
    enter_competition(table, places, rows)
    if priority is not None:
        index = slice(None) if rows is None else rows.on_device
        table.kv.priority[index] = priority(table)[index]
    keep_best(table, places, rows)
    return table


def newest_first_out(table):
    """A policy that evicts the page that was opened last."""
    return torch.where(table.kv.priority > float("-inf"), -table.kv.first.double(), table.kv.priority)


def test_prefill_competes_by_age_unless_a_policy_says_more(tokens):
    """Budget 6 pages, the sink one of them; prompts of 10, 6 and 2 pages."""
    table = evict(make_table(3, tokens, prompt="evict"), tokens, 10 * PAGE, hidden=[0, 4 * PAGE, 8 * PAGE + 1])
    everything = [list(range(start, start + PAGE)) for start in range(0, 10 * PAGE, PAGE)]
    assert held(table, 0) == [everything[0], *everything[5:]]
    assert held(table, 1) == everything[4:]
    assert held(table, 2) == [[33, 34, 35, 36], [37, 38, 39]]
    assert table.evicted.tolist() == [4, 0, 0] and table.counts.released.tolist() == [9, 5, 1]
    assert table.num_pages == 6 and table.kv.evictable.sum(1).tolist() == [5, 5, 5]
    assert_consistent(table)


def test_the_policy_says_which_prefill_stays(tokens):
    table = make_table(2, tokens, prompt="evict")
    evict(table, tokens, 10 * PAGE, hidden=[0, 3 * PAGE], priority=newest_first_out)
    for row, first in ((0, 0), (1, 3 * PAGE)):
        assert [page[0] for page in held(table, row)] == list(range(first, first + 6 * PAGE, PAGE))
    decode(table, tokens, 1)  # the smallest priority goes, the newest page
    assert [page[0] for page in held(table, 0)] == [0, 4, 8, 12, 16, 40]


def test_ties_go_to_the_older_page(tokens):
    table = make_table(1, tokens, prompt="evict")
    evict(table, tokens, 9 * PAGE, priority=lambda table: torch.zeros_like(table.kv.priority))
    assert [page[0] for page in held(table, 0)] == [0, *range(4 * PAGE, 9 * PAGE, PAGE)]


def test_a_turn_closes_the_open_page_of_its_rows_only(tokens):
    table = evict(make_table(3, tokens, prompt="evict"), tokens, 6, hidden=[0, 4, 0])
    decode(table, tokens, 2)
    decode(table, tokens, 1, rows_of(1))
    before = snapshot(table)
    evict(table, tokens, 5, rows_of(0, 2))
    assert_same(table, before, rows=[1])
    assert table.counts.decoded.tolist() == [PAGE, 3, PAGE] and table.counts.seen.tolist() == [13, 9, 13]
    decode(table, tokens)
    assert sorted(held(table, 0)[2:]) == [[6, 7], [8, 9, 10, 11], [12], [13]]
    assert held(table, 1) == [[4, 5], [6, 7, 8, 9]]
    assert_consistent(table)


def test_pages_of_rows_that_were_not_touched_stay(tokens):
    """A long prompt of one row while another is mid-page with its budget full."""
    table = make_table(3, tokens, prompt="evict")
    evict(table, tokens, 5, rows_of(1))
    decode(table, tokens, 6 * PAGE + 2, rows_of(1))
    kept, evicted = held(table, 1), table.evicted[1]
    evict(table, tokens, 12 * PAGE, rows_of(2), priority=newest_first_out)
    assert held(table, 1) == kept and table.evicted[1] == evicted and table.num_pages == 6
    decode(table, tokens, 2, rows_of(1))
    assert table.evicted[1] == evicted, "the open page had room for two tokens"
    assert table.counts.limit.tolist() == [0, 5, 5] and held(table, 0) == []
    assert_consistent(table)


def test_prompts_in_chunks_compete_chunk_by_chunk(tokens):
    """The first row's first chunk is padding only: its sink is the first page of the second."""
    table = make_table(2, tokens, prompt="evict")
    for chunk in range(3):
        evict(table, tokens, 3 * PAGE, hidden=[3 * PAGE if chunk == 0 else 0, 0])
    assert [page[0] for page in held(table, 0)] == list(range(12, 36, PAGE))
    assert [page[0] for page in held(table, 1)] == [0, *range(16, 36, PAGE)]
    assert table.counts.pinned[:, 0].all() and table.counts.pinned.sum() == 2
    assert table.evicted.tolist() == [0, 3]
    assert_consistent(table)


def test_truncate_takes_prefill_back(tokens):
    """As if the tokens had never come."""
    for hidden in ([0, 0], [5, 2]):
        tokens = Tokens()
        table = make_table(2, tokens, scoring="minmax")
        prefill(table, tokens, 6, hidden=hidden)
        before = snapshot(table)
        prefill(table, tokens, 7)
        truncate(table, np.array([6, 6]), drops_decoded=False)
        assert_same(table, before)
        assert table.num_pages == before.num_pages
        assert_consistent(table)


def test_truncate_to_different_lengths(tokens):
    table = make_table(3, tokens, scoring="minmax")
    prefill(table, tokens, 14, hidden=[0, 3, 13])
    truncate(table, np.array([9, 2, 13]), drops_decoded=False)
    assert [held(table, row) for row in range(3)] == [[[0, 1, 2, 3], [4, 5, 6, 7], [8]], [], []]
    assert table.counts.padding.tolist() == [0, 2, 13] and table.counts.prefilled.tolist() == [9, 0, 0]
    assert table.counts.limit.tolist() == [3, 6, 6]
    assert_consistent(table)


def test_truncate_a_turn_behind_decode_pages(tokens):
    table = make_table(2, tokens, scoring="minmax")
    prefill(table, tokens, 6, hidden=[3, 0])
    decode(table, tokens, 7)
    before = snapshot(table)
    prefill(table, tokens, 9)
    truncate(table, np.array([13, 13]), drops_decoded=False)
    assert_same(table, before)
    assert table.num_pages == before.num_pages
    decode(table, tokens, 30), decode(before, Tokens(5), 30)
    assert [held(table, row) for row in range(2)] == [held(before, row) for row in range(2)]
    assert_consistent(table)


def test_truncate_drops_what_was_decoded(tokens):
    table = make_table(2, tokens)
    prefill(table, tokens, 6, hidden=[3, 0])
    before = snapshot(table)
    decode(table, tokens, 40)
    truncate(table, np.array([6, 6]), drops_decoded=True)
    assert_same(table, before)
    assert not table.is_decoding
    assert_consistent(table)
