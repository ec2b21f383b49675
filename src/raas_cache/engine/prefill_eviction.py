"""`prompt="evict"`: after a prefill, its pages become evictable, and pages are evicted down to the budget."""

from __future__ import annotations

import numpy as np
import torch

from raas_kernels import PagedKV
from raas_kernels.paged_kv import take_rows

from .packed_pages import pack_open_pages
from .page_table import PageTable
from .prefill import Places
from .resize import allocating, gathered, put_rows, take_out
from .row_counts import Rows


def enter_competition(table: PageTable, places: Places, rows: Rows | None) -> None:
    """Make the prefill pages evictable. The priority of a page is the sequence index of its newest token.

    The first page of the first prefill of a row is the sink, and stays pinned.

    Args:
        places: the slots of the prefill of the last forward.
        rows: the rows of that forward; None for all.
    """
    kv, counts, size = table.kv, table.counts, table.page_size
    assert kv is not None
    touched = np.arange(table.batch_size) if rows is None else rows.on_host
    # 1. The priority of each page: the sequence index of its newest token.
    start = counts.seen[touched] - places.stored  # the first stored token of the forward
    nth = np.arange(table.num_pages) - places.base[:, None]  # [rows, pages], the nth page of the prefill
    is_new = (nth >= 0) & (nth < places.pages[:, None])
    newest = np.minimum(start[:, None] + (nth + 1) * size, counts.seen[touched][:, None]) - 1
    index = slice(None) if rows is None else rows.on_device
    device_new, device_newest = (torch.from_numpy(array).to(table.device)[:, None] for array in (is_new, newest))
    kv.priority[index] = torch.where(device_new, device_newest.to(kv.priority.dtype), kv.priority[index])
    if kv.states is not None:
        kv.states[index] = torch.where(device_new[..., None], 0.0, kv.states[index])
    # 2. All pages except the sink are evictable, even if a row has more of them than its limit.
    holds_sink = counts.prefilled[touched] > 0
    counts.pinned[touched] = (np.arange(table.num_pages) == 0) & holds_sink[:, None]
    kv.evictable.copy_(torch.from_numpy(~counts.pinned).to(table.device))


@allocating
def keep_best(table: PageTable, places: Places, rows: Rows | None) -> None:
    """Keep the sink of each row, and the `limit` evictable pages with the highest (priority, first token index).

    In a pool, the rows of this forward give back the blocks that they cannot need any more. Other rows do not change.
    """
    kv, counts, size = table.kv, table.counts, table.page_size
    assert kv is not None
    touched = np.arange(table.batch_size) if rows is None else rows.on_host
    limit, device_touched = table.limit_beside(1), torch.from_numpy(touched).to(table.device)
    closes = torch.zeros(table.batch_size, dtype=torch.bool, device=table.device)
    closes[device_touched] = True
    # Step 2 closes the open pages of these rows. A row in a pool has one prompt, so it has no open page yet.
    if kv.is_packed and kv.blocks is None:
        pack_open_pages(kv, closes)
    # 1. Copy the sink and the best pages, in their order: of all rows, or of the rows of this forward.
    moving = None if kv.blocks is None else device_touched
    index = _best_pages(kv, limit, moving)  # [moving, kv_heads, 1 + kept]
    small = gathered(kv, index) if moving is None else take_out(kv, moving, index)
    # 2. Close the open pages of these rows: the next decode token opens a new page. Other open pages have moved.
    unfilled = (small.positions > small.clock[..., :1]) & take_rows(closes, moving)[:, None, None]
    small.positions.masked_fill_(unfilled, -1)
    open_page = (index == (small.open_slot // size)[..., None]).int().argmax(-1)
    small.open_slot = open_page * size
    closing = -counts.decoded % size
    closing[~np.isin(np.arange(table.batch_size), touched)] = 0
    small.clock = small.clock.clone()
    small.clock[..., 1] += take_rows(torch.from_numpy(closing).to(table.device), moving)[:, None]
    # 3. Counts.
    counts.decoded += closing
    counts.released[touched] += places.pages - places.begins
    counts.prefilled[touched] = np.where(counts.prefilled[touched] > 0, size, 0)
    # 4. The pages that were copied are the first pages of their rows.
    if moving is None or table.blocks is None:
        table.kv = small
        counts.set_pages(small.num_pages)
        table.set_pages(max(small.num_pages, 1 + table.pages_to_allocate(small.num_pages - 1, limit)))
        return
    put_rows(kv, moving, small)
    for row in touched.tolist():
        table.blocks.shrink(row, 1 + limit)
    table.set_pages(int(table.blocks.reserved.max()))


def _best_pages(kv: PagedKV, limit: int, rows: torch.Tensor | None) -> torch.Tensor:
    """The sink and the best `limit` other pages of `rows` `[rows]`, or of all rows: `[rows, kv_heads, 1 + kept]` int64.

    Pages are sorted by priority, and pages with equal priority by age. Empty pages come first.
    """
    priority, first = take_rows(kv.priority, rows)[..., 1:], take_rows(kv.first, rows)[..., 1:]
    by_age = first.argsort(dim=-1, stable=True)
    order = by_age.gather(-1, priority.gather(-1, by_age).argsort(dim=-1, stable=True))
    best = order[..., -limit:].sort(-1).values + 1
    return torch.cat([torch.zeros_like(take_rows(kv.open_slot, rows))[..., None], best], -1)
