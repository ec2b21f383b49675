"""A pool in the caller's memory, and the pages of a row in a pool, which are reserved before its first forward."""

from __future__ import annotations

import numpy as np
import torch

from .page_table import PageTable
from .resize import CONTENTS, allocating, movable


@allocating
def use_memory(table: PageTable, keys: torch.Tensor, values: torch.Tensor, rows: int) -> None:
    """Keep the keys and values of `rows` rows in a pool that lies in the caller's memory.

    Args:
        table: an empty table.
        keys, values: `[blocks, kv_heads, page_size, head_dim]`, may be strided, with a contiguous last dimension.
    """
    assert table.settings.kv_dtype is None, "the caller's memory has no place for scales"
    table.use_pool(len(keys))
    table.allocate(keys[:, :, :0], values[:, :, :0], rows, contents=(keys, values))
    table.is_empty = False  # so no forward is the first one, whose output the model itself would compute


@allocating
def reserve(table: PageTable, row: int, pages: int, shared_from: tuple[int, int] | None = None) -> None:
    """Take blocks for `pages` pages of the free row `row`: for its prompt, and for as many decode pages as it can need.

    With `prompt="evict"`, the pages of the whole prompt; after its prefill, the row gives back the blocks that it does
    not need any more.

    Args:
        table: it has a pool and buffers (`PageTable.use_pool`, `PageTable.allocate`).
        shared_from: a row and a number of its first pages, which are full pages of its prompt. They become the first
            pages of `row`, in the same blocks. The row then is as after a prefill of their tokens. None if `row` shares
            no pages.

    Raises:
        RuntimeError: not enough blocks are free, or the row is not free. Nothing has changed.
        ValueError: the other row does not have so many full pages of a prompt without padding, or pages of a prompt can
            be evicted (`prompt="evict"`). Nothing has changed.
    """
    kv, blocks, counts = table.kv, table.blocks, table.counts
    assert kv is not None and blocks is not None, "call use_pool and allocate first"
    # 1. Check the arguments.
    if blocks.reserved[row] or not counts.are_free[row]:
        raise RuntimeError(f"Row {row} holds a sequence, or has reserved pages already: release the row first.")
    source, shared = shared_from or (row, 0)
    if shared:
        full = 0 if table.settings.prompt == "evict" or counts.padding[source] else counts.prefilled[source]
        if shared > min(pages, full // table.page_size) or not counts.pinned[source, :shared].all():
            raise ValueError(
                f"shared_from={shared_from}: row {row} reserves {pages} pages, and can share at most as many full "
                f"pages of the prompt of row {source}. This prompt must have no left padding. Its pages must stay: use "
                "prompt='pin' or 'select'."
            )
    # 2. Blocks on the host, and pages of all rows for them.
    taken = blocks.pool.take(pages - shared)
    try:
        table.resize(max(pages, table.num_pages))
    except BaseException:
        blocks.pool.give_back(taken)
        raise
    prefix = blocks.ids[source, :shared].copy()
    blocks.pool.share(prefix)
    blocks.ids[row, :shared], blocks.ids[row, shared:pages] = prefix, taken
    # 3. Clear what earlier rows left in the blocks: attention multiplies it by 0, which leaves NaN as it is.
    kv, index = table.kv, torch.from_numpy(taken).to(table.device).long()
    assert kv is not None
    for name in CONTENTS:
        pool = getattr(kv, name)
        if pool is not None:
            movable(pool)[index] = 0
    # 4. The row is empty, or is as after a prefill of the shared pages.
    counts.clear(np.array([row]))
    kv.priority[row], kv.bias[row], kv.positions[row] = float("-inf"), float("-inf"), -1
    for buffer in (kv.states, kv.open_keys, kv.key_min, kv.key_max):
        if buffer is not None:
            buffer[row] = 0
    kv.open_slot[row] = 0
    if shared:
        tokens = shared * table.page_size
        for buffer, entries in ((kv.bias, tokens), (kv.positions, tokens), (kv.key_min, shared), (kv.key_max, shared)):
            if buffer is not None:
                buffer[row, :, :entries] = buffer[source, :, :entries]
        counts.seen[row] = counts.prefilled[row] = tokens
        counts.pinned[row, :shared] = True
        counts.limit[row] = table.limit_beside(shared)
    kv.clock[row, :, 0], kv.clock[row, :, 1] = int(counts.seen[row]) - 1, -1
    table.lay_out()
