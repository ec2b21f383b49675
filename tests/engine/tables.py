"""Page tables without a model: random keys and values, and what stands where."""

import copy

import numpy as np
import torch

import raas_kernels
from raas_cache.engine.layer_settings import LayerSettings
from raas_cache.engine.page_table import PageTable
from raas_cache.engine.prefill import write_prefill
from raas_cache.engine.row_counts import Rows
from raas_cache.methods.raas import RaaSPolicy


HEADS, KEY_SIZE, VALUE_SIZE, PAGE = 2, 4, 6, 4
CPU = torch.device("cpu")


def settings(budget=6 * PAGE, **more):
    return LayerSettings(
        more.pop("policy", RaaSPolicy(alpha=0.1)), budget, **{"page_size": PAGE, "min_decode_pages": 2, **more}
    )


def rows_of(*indices):
    return Rows.from_list(list(indices), CPU)


class Tokens:
    """Random keys and values, and the tokens of each row in their order."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows, new):
        """Key `[rows, HEADS, new, KEY_SIZE]` and value `[rows, HEADS, new, VALUE_SIZE]`."""
        return tuple(
            torch.randn(rows, HEADS, new, size, dtype=torch.float64, generator=self.generator)
            for size in (KEY_SIZE, VALUE_SIZE)
        )


def make_table(batch, tokens, **more):
    """An empty table of `batch` rows."""
    table = PageTable(settings(**more))
    table.allocate(*tokens(batch, 1), batch)
    return table


def prefill(table, tokens, new, rows=None, hidden=None):
    """A prefill of `new` tokens in `rows`; `hidden[i]` tokens of the ith of these rows are left padding."""
    count = table.batch_size if rows is None else len(rows.on_host)
    visible = None
    if hidden is not None:
        visible = torch.arange(new) >= torch.tensor(hidden)[:, None]
    return write_prefill(table, *tokens(count, new), visible, hidden, rows)


def decode(table, tokens, steps=1, rows=None):
    """So many decode tokens in `rows`."""
    for _ in range(steps):
        table.before_decode(rows)
        count = table.batch_size if rows is None else len(rows.on_host)
        raas_kernels.append(table.kv, *tokens(count, 1), rows=None if rows is None else rows.on_device)
    return table


def pages(table, row, head=0):
    """The visible positions in each page of a row, a list for each page."""
    kv = table.kv
    shown = kv.positions[row, head].masked_fill(kv.bias[row, head] != 0, -1).view(-1, table.page_size)
    return [[position for position in page if position >= 0] for page in shown.tolist()]


def snapshot(table):
    """A copy of the table, to compare with later."""
    return copy.deepcopy(table)


def assert_same(now, before, rows=slice(None)):
    """Every buffer and count of `rows` is what it was; pages that were added since hold nothing.

    The keys and values of slots without a token do not matter, nor does a free slot's position in a page without one.
    """
    ours, theirs = now.kv, before.kv
    size, kept = now.page_size, before.num_pages
    assert now.num_pages >= kept
    assert (ours.bias[rows, :, kept * size :] == float("-inf")).all()
    assert (ours.priority[rows, :, kept:] == float("-inf")).all()
    shown = theirs.bias[rows] == 0
    for held, expected in ((ours.positions, theirs.positions), *zip(now.states(), before.states(), strict=True)):
        assert torch.equal(held[rows, :, : kept * size][shown], expected[rows][shown])
    for name, entries in (("bias", size), ("priority", 1), ("key_min", 1), ("key_max", 1), ("states", 1)):
        held, expected = getattr(ours, name), getattr(theirs, name)
        if expected is None:
            continue
        held, expected = held[rows, :, : kept * entries], expected[rows]
        if name.startswith("key") and ours.open_keys is not None:  # the bounds of an empty page of codes do not matter
            has_token = shown.unflatten(2, (-1, size)).any(3)
            held, expected = held[has_token], expected[has_token]
        assert torch.equal(held, expected), name
    assert torch.equal(ours.clock[rows], theirs.clock[rows])
    if ours.open_keys is not None:
        lane = torch.arange(size)[:, None]
        is_taken = lane <= (theirs.clock[rows][..., 1] % size)[..., None, None]
        assert torch.equal(ours.open_keys[rows].where(is_taken, 0), theirs.open_keys[rows].where(is_taken, 0))
    has_open_page = torch.from_numpy(before.counts.decoded[rows] > 0)
    assert torch.equal(ours.open_slot[rows][has_open_page], theirs.open_slot[rows][has_open_page])
    for name, counts in vars(before.counts).items():
        mine = getattr(now.counts, name)[rows]
        mine = mine[:, :kept] if name == "pinned" else mine
        assert np.array_equal(mine, counts[rows]), name


def assert_consistent(table):
    """The host's counts agree with the buffers."""
    kv, counts = table.kv, table.counts
    assert torch.equal(kv.clock[..., 0], torch.from_numpy(counts.seen - 1)[:, None].expand(-1, HEADS))
    assert counts.pinned.shape == (table.batch_size, table.num_pages)
    free = ~counts.pinned
    evictable = free & (free.cumsum(1) <= counts.limit[:, None])
    assert np.array_equal(kv.evictable.numpy(), evictable)
    assert table.limit.flatten().tolist() == counts.limit.tolist()
    for row in range(table.batch_size):
        for head in range(HEADS):
            held = [position for page in pages(table, row, head) for position in page]
            assert len(held) == len(set(held))
