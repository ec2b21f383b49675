"""What was taken down of one layer, attention call by attention call."""

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

INPUT = -1  # in place of the page that a generated token went to
GONE = -2  # in place of a page that was evicted before the recording began


@dataclass
class Forward:
    """What one layer held after one attention call.

    Args:
        step: sequence index of the newest token.
        page: sequence index of the first token of the page that a generated token went to; `INPUT` for input.
        first: `[batch, heads, pages]` int32, sequence index of each page's first token, -1 if it holds none.
        score: `[batch, heads, pages]` float32, the scores that the policy was told; NaN where it asked for none.
        stamp: `[batch, heads, pages]` float32, the pages' priority, for RaaS their timestamp; NaN for pinned pages.
        resident: `[batch, heads]` int32, tokens held.
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
        heads: KV heads recorded, None for all.
        entries: the attention calls; and where rows changed places between them, an index `[batch]`: row i goes on as
            a copy of row `index[i]`.
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
        """Forget the tokens from index `seen` on, which were taken back."""
        self.entries = [entry for entry in self.entries if isinstance(entry, np.ndarray) or entry.step < seen]

    def apply_to_rows(self, function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> None:
        """Rows change places, or number: as `function` does to the index `rows` of each."""
        self.entries.append(function(rows).cpu().numpy())

    def forwards(self) -> list[Forward]:
        """The attention calls, each with the rows that became those of today."""
        rows: slice | np.ndarray = slice(None)
        found: list[Forward] = []
        for entry in reversed(self.entries):
            if isinstance(entry, np.ndarray):
                rows = entry[rows]
                continue
            arrays = (getattr(entry, name)[rows] for name in (*PAGED, "resident"))
            found.append(Forward(entry.step, entry.page, *arrays))
        return found[::-1]
