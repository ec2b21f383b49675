"""With `prompt="evict"`: prefill that competes with all other pages, cut down to the budget after its forward."""

from __future__ import annotations

import numpy as np
import torch

from .page_table import PageTable
from .prefill import Places
from .resize import allocating, gathered
from .row_counts import Rows


def enter_competition(table: PageTable, places: Places, rows: Rows | None) -> None:
    """Make the prefill pages evictable, each with the index of its newest token as priority; a row's sink stays pinned.

    The sink is the first page of a row's first prefill.

    Args:
        places: where the prefill of the last forward stands.
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
    # 2. All pages but the sink are evictable, also beyond the limit.
    holds_sink = counts.prefilled[touched] > 0
    counts.pinned[touched] = (np.arange(table.num_pages) == 0) & holds_sink[:, None]
    kv.evictable = torch.from_numpy(~counts.pinned).to(table.device)


@allocating
def keep_best(table: PageTable, places: Places, rows: Rows | None) -> None:
    """Keep each row's sink and the `limit` evictable pages of the highest (priority, first token index)."""
    kv, counts, size = table.kv, table.counts, table.page_size
    assert kv is not None
    touched = np.arange(table.batch_size) if rows is None else rows.on_host
    limit = table.limit_beside(1)
    # 1. Rank: pages 1 and on, the oldest first, then by priority; empty pages come first of all.
    first = kv.first[..., 1:]  # [batch, kv_heads, pages - 1]
    by_age = first.argsort(dim=-1, stable=True)
    order = by_age.gather(-1, kv.priority[..., 1:].gather(-1, by_age).argsort(dim=-1, stable=True))
    # 2. Move: the sink, and the best pages in the order in which they stand.
    best = order[..., -limit:].sort(-1).values + 1
    index = torch.cat([torch.zeros_like(kv.open_slot)[..., None], best], -1)  # [batch, kv_heads, 1 + kept]
    small = gathered(kv, index)
    # 3. The open pages of these rows are closed, for decode tokens open pages of their own; others have moved.
    is_touched = torch.zeros(table.batch_size, dtype=torch.bool, device=table.device)
    is_touched[torch.from_numpy(touched).to(table.device)] = True
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
