"""`prompt="evict"`: after a prefill, its pages become evictable, and pages are evicted down to the budget."""

from __future__ import annotations

import numpy as np
import torch

from .packed_pages import pack_open_pages
from .page_table import PageTable
from .prefill import Places
from .resize import allocating, gathered
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
    kv.evictable = torch.from_numpy(~counts.pinned).to(table.device)


@allocating
def keep_best(table: PageTable, places: Places, rows: Rows | None) -> None:
    """Keep the sink of each row, and the `limit` evictable pages with the highest (priority, first token index)."""
    kv, counts, size = table.kv, table.counts, table.page_size
    assert kv is not None
    touched = np.arange(table.batch_size) if rows is None else rows.on_host
    limit = table.limit_beside(1)
    # 1. Sort the pages after the sink by priority, and pages with equal priority by age. Empty pages come first.
    is_touched = torch.zeros(table.batch_size, dtype=torch.bool, device=table.device)
    is_touched[torch.from_numpy(touched).to(table.device)] = True
    if kv.is_packed:  # step 3 closes their open pages
        pack_open_pages(kv, is_touched)
    first = kv.first[..., 1:]  # [batch, kv_heads, pages - 1]
    by_age = first.argsort(dim=-1, stable=True)
    order = by_age.gather(-1, kv.priority[..., 1:].gather(-1, by_age).argsort(dim=-1, stable=True))
    # 2. Move the sink and the best pages to the front; the best pages keep their order.
    best = order[..., -limit:].sort(-1).values + 1
    index = torch.cat([torch.zeros_like(kv.open_slot)[..., None], best], -1)  # [batch, kv_heads, 1 + kept]
    small = gathered(kv, index)
    # 3. Close the open pages of these rows: the next decode token opens a new page. Other open pages have moved.
    unfilled = (small.positions > small.clock[..., :1]) & is_touched[:, None, None]
    small.positions.masked_fill_(unfilled, -1)
    open_page = (index == (kv.open_slot // size)[..., None]).int().argmax(-1)
    small.open_slot = open_page * size
    closing = -counts.decoded % size
    closing[~np.isin(np.arange(table.batch_size), touched)] = 0
    small.clock = kv.clock.clone()
    small.clock[..., 1] += torch.from_numpy(closing).to(table.device)[:, None]
    # 4. Counts.
    table.kv = small
    counts.decoded += closing
    counts.released[touched] += places.pages - places.begins
    counts.prefilled[touched] = np.where(counts.prefilled[touched] > 0, size, 0)
    counts.set_pages(small.num_pages)
    table.set_pages(max(small.num_pages, 1 + table.pages_to_allocate(small.num_pages - 1, limit)))
