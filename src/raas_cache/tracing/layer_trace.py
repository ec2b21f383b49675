"""The trace of one layer: one entry per attention call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..engine.resize import uncompiled


if TYPE_CHECKING:
    from ..engine.page_table import PageTable


PREFILL = -1  # in place of a page: the entry is of a prefill
EVICTED = -2  # in place of a page: it was evicted before the recording began
PER_PAGE = ("first", "score", "priority")
"""The arrays of a `TraceEntry` with one element per page, in the order of `recording_file.PAGED`."""


@dataclass
class TraceEntry:
    """The pages of one layer after one attention call.

    Args:
        step: position of the newest token in the sequence.
        page: position of the first token of the page that holds a generated token; `PREFILL` for a prefill.
        first: `[batch, heads, pages]` int32, position of each page's first token, -1 for an empty page.
        score: `[batch, heads, pages]` float32, the scores that the policy received; NaN if it needs no scores.
        priority: `[batch, heads, pages]` float32, priority of each page, for RaaS its timestamp; NaN for pinned pages.
        resident: `[batch, heads]` int32, number of tokens held.
    """

    step: int
    page: int
    first: np.ndarray
    score: np.ndarray
    priority: np.ndarray
    resident: np.ndarray


@dataclass
class LayerTrace:
    """What was recorded of one layer, written by the layer itself.

    Args:
        heads: the KV heads to record, None for all.
        entries: the attention calls, and an index `[batch]` wherever rows were reordered between two calls: row i
            continues as a copy of row `index[i]`.
        begin: `[batch, tokens]` int32, for each token seen at the first entry, the position of the first token of its
            page; `EVICTED` if no recorded head holds it. Its rows are those of the first entry.
    """

    heads: tuple[int, ...] | None = None
    entries: list[TraceEntry | np.ndarray] = field(default_factory=list)
    begin: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int32))

    @uncompiled
    def note(self, table: PageTable, scores: torch.Tensor | None, is_prefill: bool) -> None:
        """Add an entry: the pages of `table`, and the scores `[batch, kv_heads, pages]` that the policy received."""
        if self.heads is None:
            self.heads = tuple(range(table.num_heads))
        if max(self.heads) >= table.num_heads:
            raise ValueError(f"heads={list(self.heads)}: the layers of this model have {table.num_heads} KV heads.")
        kv = table.kv
        assert kv is not None
        resident = kv.bias == 0  # [batch, kv_heads, slots]
        first = kv.first.masked_fill(~resident.unflatten(2, (-1, table.page_size)).any(-1), -1)
        if not any(isinstance(entry, TraceEntry) for entry in self.entries):
            self.begin = self._pages_of_tokens(table, first)
        pinned = torch.from_numpy(table.counts.pinned).to(table.device)[:, None]  # [batch, 1, pages]
        priority = kv.priority.masked_fill(pinned, float("nan"))
        score = torch.full_like(priority, float("nan")) if scores is None else scores
        page = PREFILL if is_prefill else int(kv.positions[0, 0, kv.open_slot[0, 0]])
        noted = (first, score.float(), priority.float(), resident.sum(-1).int())
        arrays = (tensor[:, list(self.heads)].cpu().numpy() for tensor in noted)
        self.entries.append(TraceEntry(table.length - 1, page, *arrays))

    def _pages_of_tokens(self, table: PageTable, first: torch.Tensor) -> np.ndarray:
        """See `begin`. A user's turn may have come between two tokens of a page, so positions have gaps.

        Args:
            first: `[batch, kv_heads, pages]`, position of each page's first token, -1 for an empty page.
        """
        assert table.kv is not None and self.heads is not None
        heads = list(self.heads)
        positions = table.kv.positions[:, heads].cpu().numpy()  # [batch, heads, slots]
        page = first[:, heads].cpu().numpy().repeat(table.page_size, 2)
        is_held = (positions >= 0) & (positions < table.length) & (page >= 0)
        begin = np.full((table.batch_size, table.length), EVICTED, np.int32)
        begin[np.nonzero(is_held)[0], positions[is_held]] = page[is_held]
        return begin

    def forget(self, seen: int) -> None:
        """Remove the tokens from position `seen` on, which the cache has taken back."""
        self.entries = [entry for entry in self.entries if isinstance(entry, np.ndarray) or entry.step < seen]

    def apply_to_rows(self, function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> None:
        """Note that rows were reordered, repeated or removed, as `function` does with the index `rows` `[batch]`."""
        self.entries.append(function(rows).cpu().numpy())

    def calls(self) -> list[TraceEntry]:
        """The entries of the attention calls. In each entry, row i is the past of the current row i."""
        return self._of_current_rows()[0]

    def begin_of_current_rows(self) -> np.ndarray:
        """`begin`, in which row i is the past of the current row i."""
        return self._of_current_rows()[1]

    def _of_current_rows(self) -> tuple[list[TraceEntry], np.ndarray]:
        rows: slice | np.ndarray = slice(None)
        found: list[TraceEntry] = []
        begin = self.begin
        for entry in reversed(self.entries):
            if isinstance(entry, np.ndarray):
                rows = entry[rows]
                continue
            arrays = (getattr(entry, name)[rows] for name in (*PER_PAGE, "resident"))
            found.append(TraceEntry(entry.step, entry.page, *arrays))
            begin = self.begin[rows]
        return found[::-1], begin
