"""The rows of the paged layers of a model: a request has one row, from its admission to its end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..cache.paged_layer import PagedLayer
from ..engine.reserve import reserve
from ..engine.resize import CONTENTS
from ..engine.row_counts import Rows


SPARE = 0  # a row for the padding of a CUDA graph; no request gets it


class RowStore:
    """Gives rows to requests, and pages to rows.

    The pages of all rows of a layer are in one pool, which never grows. A request gets all pages that it can ever need
    when it is admitted, so no later step can run out of memory. Requests whose prompts begin alike share pages.

    Args:
        layers: the paged layers by their index, with buffers for `rows` rows.
        rows: number of rows, with the spare row.
        device: device of the layers.
    """

    def __init__(self, layers: dict[int, PagedLayer], rows: int, device: torch.device):
        self.layers, self.device = layers, device
        self._parts = [part for layer in layers.values() for part in layer.parts]
        self.tables = [part.table for part in self._parts]
        self._pools = [table.blocks.pool for table in self.tables if table.blocks is not None]
        settings = self.tables[0].settings
        self.page_size = settings.page_size
        # A prompt alone is read exactly, and its first pages would be codes here.
        self.shares_prefixes = settings.prompt != "evict" and settings.kv_dtype is None
        self.rows: dict[str, int] = {}  # by request
        self._prompts: dict[int, np.ndarray] = {}  # of each row
        self._stored: dict[int, int] = {}  # prompt tokens of each row that are in its pages
        self._free = list(range(rows - 1, SPARE, -1))
        self._ended: list[int] = []  # rows that no request has any more, before `clear_ended`

    @property
    def free_rows(self) -> int:
        """Number of rows that a request can get."""
        return len(self._free) + len(self._ended)

    @property
    def free_pages(self) -> list[int]:
        """Number of pages of each table that no row has. Pages of ended requests count from the next step on."""
        return [pool.free for pool in self._pools]

    @property
    def nbytes(self) -> int:
        """Bytes of the pools of keys and values, which are allocated once."""
        buffers = (getattr(table.kv, name) for table in self.tables for name in CONTENTS)
        return sum(buffer.nbytes for buffer in buffers if buffer is not None)

    @property
    def shapes(self) -> object:
        """What a recorded decode step depends on: it changes when buffers move, or when a step reads more pages."""
        return [
            (table.kv.positions.data_ptr(), table.limit.data_ptr(), table.pages_read, table.pages_read_by_row is None)
            for table in self.tables
            if table.kv is not None
        ]

    def fits(self, needed: Sequence[int]) -> bool:
        """Whether a request that needs these pages in each table could be admitted if there were no other."""
        return all(pages < pool.blocks for pages, pool in zip(needed, self._pools, strict=True))  # one is spare

    def admit(self, request_id: str, prompt: Sequence[int], needed: Sequence[int]) -> int | None:
        """Give a request its row, and the row the pages that it needs in each table.

        Returns:
            The number of prompt tokens that are in its pages already, because another row's prompt begins alike; None
            if the request has to wait for a row, for pages, or for a prompt that begins alike and is being read.
        """
        self.clear_ended()
        if not self._free:
            return None
        tokens = np.asarray(prompt, np.int64)
        source, shared, is_stored = self._longest_prefix(tokens)
        if not is_stored:
            return None
        if any(pages - shared > pool.free for pages, pool in zip(needed, self._pools, strict=True)):
            return None
        row = self._free.pop()
        for pages, table in zip(needed, self.tables, strict=True):
            reserve(table, row, pages, shared_from=(source, shared) if shared else None)
        self.rows[request_id], self._prompts[row], self._stored[row] = row, tokens, shared * self.page_size
        return shared * self.page_size

    def stored(self, request_id: str, tokens: int) -> None:
        """Note that `tokens` tokens of a request's prompt are in its pages."""
        self._stored[self.rows[request_id]] = tokens

    def release(self, request_id: str) -> None:
        """Take the row of a request back. Its pages are free at the next admission."""
        row = self.rows.pop(request_id, None)
        if row is not None:
            self._ended.append(row)
            del self._prompts[row], self._stored[row]

    def clear_ended(self) -> None:
        """Empty the rows of ended requests."""
        if not self._ended:
            return
        ended = Rows.from_list(self._ended, self.device)
        for part in self._parts:
            part.engine.release_rows(ended)
        self._free += self._ended
        self._ended = []

    def _longest_prefix(self, prompt: np.ndarray) -> tuple[int, int, bool]:
        """The row whose prompt has the longest beginning in common with `prompt`, in whole pages.

        Returns:
            The row, the number of pages in common (0 for none), and whether all of them are stored.
        """
        best = (SPARE, 0, True)
        if not self.shares_prefixes:
            return best
        longest = (len(prompt) - 1) // self.page_size  # the last token of a prompt is read, for its logits
        for row, other in self._prompts.items():
            length = min(len(other), longest * self.page_size)
            differs = np.flatnonzero(other[:length] != prompt[:length])
            pages = (int(differs[0]) if differs.size else length) // self.page_size
            is_stored = self._stored[row] >= pages * self.page_size
            if (pages, is_stored) > best[1:]:
                best = (row, pages, is_stored)
        return best
