"""Which pages of each row can be recycled, and how many pages a decode step reads: what a budget means for a row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layer_settings import LayerSettings
from .row_counts import RowCounts


@dataclass(frozen=True)
class Layout:
    """The pages of each row.

    Args:
        evictable: `[batch, pages]` bool, whether the row may fill and recycle the page: as many free pages as its
            limit.
        reads: `[batch]` int64, number of pages that a decode step reads.
        is_full_size: whether every row has as many evictable pages as its limit.
    """

    evictable: np.ndarray
    reads: np.ndarray
    is_full_size: bool

    @classmethod
    def of(cls, counts: RowCounts, settings: LayerSettings, reserved: np.ndarray | None = None) -> Layout:
        """The layout of the rows with these counts.

        Args:
            reserved: `[batch]`, number of first pages of each row that have memory; None if all pages have.
        """
        # 1. The first free pages of each row, up to its limit.
        pinned_pages, free = counts.pinned_pages, ~counts.pinned
        evictable = free & (free.cumsum(1) <= counts.limit[:, None])
        if reserved is not None:
            evictable &= np.arange(free.shape[1]) < reserved[:, None]
        evictable_pages = evictable.sum(1)
        # 2. Pages to read: all evictable pages and a part of the prefill, or the budget.
        budget = settings.budget // settings.page_size
        if settings.policy.reads == "all":
            prefill = [settings.prefill_pages_read(int(pages)) for pages in pinned_pages]
            reads = evictable_pages + np.array(prefill, np.int64)
        elif settings.prompt == "select":
            reads = np.full_like(pinned_pages, max(budget, 1))
        else:
            reads = pinned_pages + (budget - pinned_pages).clip(settings.min_decode_pages)
        reads[counts.are_free] = reads.max(initial=0)
        return cls(evictable, reads, bool((evictable_pages >= counts.limit).all()))
