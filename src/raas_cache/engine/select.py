"""Selection of the pages that a decode step reads, if it does not read all pages (Quest, section 3.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from raas_kernels.paged_kv import take_rows


if TYPE_CHECKING:
    from .page_table import PageTable


def select_pages(table: PageTable, bounds: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor | None:
    """The pages with the highest bounds.

    A policy that evicts always reads all evictable pages; with `prompt="select"`, the selection is among the pinned
    pages. A policy with `reads="top"` always reads the page of the newest token, and with `prompt="pin"` all pinned
    pages; the selection is among the other pages.

    Args:
        bounds: `[rows, heads, pages]`, upper bounds of the pages' logits.
        rows: `[rows]` int64, the rows of the batch; None for all.

    Returns:
        `[rows, heads, selected]` int64, page indices. Of two pages with equal bounds, the one with the lower index is
        taken. A row that reads fewer pages than another is filled up with -1. None if every page is read.
    """
    kv, settings, wanted = table.kv, table.settings, table.pages_read
    assert kv is not None
    if wanted >= bounds.shape[-1] and table.pages_read_by_row is None:
        return None
    evictable = kv.evictable if rows is None else kv.evictable[rows]
    open_slot = kv.open_slot if rows is None else kv.open_slot[rows]
    evictable = evictable[:, None].expand_as(bounds)
    if settings.policy.reads == "all":
        bounds = bounds.masked_fill(evictable, float("inf"))
    else:
        newest = (open_slot // table.page_size)[..., None].expand(-1, bounds.shape[1], -1)
        bounds = bounds.scatter(-1, newest, float("inf"))
        if settings.prompt == "pin":
            pinned = ~evictable
            if kv.blocks is not None:  # a page without memory is not evictable either
                pinned = pinned & (take_rows(kv.blocks, rows) > 0)[:, None]
            bounds = bounds.masked_fill(pinned, float("inf"))
    selected = bounds.argsort(dim=-1, descending=True, stable=True)[..., :wanted]
    if table.pages_read_by_row is None:
        return selected
    limit = table.pages_read_by_row if rows is None else table.pages_read_by_row[rows]
    return selected.masked_fill(torch.arange(wanted, device=bounds.device) >= limit, -1)
