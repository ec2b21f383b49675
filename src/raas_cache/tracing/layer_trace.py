"""The trace of one layer: one entry per attention call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..engine.resize import uncompiled
from .recording_file import PAGED


if TYPE_CHECKING:
    from ..engine.page_table import PageTable

INPUT = -1  # a prefill: instead of the page of a generated token
GONE = -2  # instead of a page that was evicted before the recording began


@dataclass
class Forward:
    """The pages of one layer after one attention call.

    Args:
        step: position of the newest token in the sequence.
        page: position of the first token of the page that holds a generated token; `INPUT` for a prefill.
        first: `[batch, heads, pages]` int32, position of each page's first token, -1 for an empty page.
        score: `[batch, heads, pages]` float32, the scores that the policy received; NaN if it needs no scores.
        stamp: `[batch, heads, pages]` float32, priority of each page (for RaaS the timestamp); NaN for pinned pages.
        resident: `[batch, heads]` int32, number of tokens held.
    """

    step: int
    page: int
    first: np.ndarray
    score: np.ndarray
    stamp: np.ndarray
    resident: np.ndarray


@dataclass
class LayerTrace:
    """What was recorded of one layer, written by the layer itself.

    Args:
        heads: the KV heads to record, None for all.
        entries: the attention calls, and an index `[batch]` wherever rows were reordered between two calls: row i
            continues as a copy of row `index[i]`.
    """

    heads: tuple[int, ...] | None = None
    entries: list[Forward | np.ndarray] = field(default_factory=list)

    @uncompiled
    def note(self, table: PageTable, scores: torch.Tensor | None, is_prefill: bool) -> None:
        """Take down what `table` holds, and the scores `[batch, kv_heads, pages]` that the policy was told."""
        if self.heads is None:
            self.heads = tuple(range(table.num_heads))
        if max(self.heads) >= table.num_heads:
            raise ValueError(f"heads={list(self.heads)}: the layers of this model have {table.num_heads} KV heads.")
        kv = table.kv
        assert kv is not None
        resident = kv.bias == 0  # [batch, kv_heads, slots]
        first = kv.first.masked_fill(~resident.unflatten(2, (-1, table.page_size)).any(-1), -1)
        pinned = torch.from_numpy(table.counts.pinned).to(table.device)[:, None]  # [batch, 1, pages]
        stamp = kv.priority.masked_fill(pinned, float("nan"))
        score = torch.full_like(stamp, float("nan")) if scores is None else scores
        page = INPUT if is_prefill else int(kv.positions[0, 0, kv.open_slot[0, 0]])
        noted = (first, score.float(), stamp.float(), resident.sum(-1).int())
        arrays = (tensor[:, list(self.heads)].cpu().numpy() for tensor in noted)
        self.entries.append(Forward(table.length - 1, page, *arrays))

    def forget(self, seen: int) -> None:
        """Remove the tokens from position `seen` on, which the cache has taken back."""
        self.entries = [entry for entry in self.entries if isinstance(entry, np.ndarray) or entry.step < seen]

    def apply_to_rows(self, function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> None:
        """Note that rows were reordered, repeated or removed, as `function` does with the index `rows` `[batch]`."""
        self.entries.append(function(rows).cpu().numpy())

    def forwards(self) -> list[Forward]:
        """The attention calls. In each call, row i is the past of the current row i."""
        rows: slice | np.ndarray = slice(None)
        found: list[Forward] = []
        for entry in reversed(self.entries):
            if isinstance(entry, np.ndarray):
                rows = entry[rows]
                continue
            arrays = (getattr(entry, name)[rows] for name in (*PAGED, "resident"))
            found.append(Forward(entry.step, entry.page, *arrays))
        return found[::-1]
