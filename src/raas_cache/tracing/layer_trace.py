"""What was taken down of one layer, attention call by attention call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..engine.page_table import uncompiled
from .recording_file import PAGED


if TYPE_CHECKING:
    from ..engine.page_table import PageStore

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
class LayerRecording:
    """What was recorded of one layer, written by the layer itself.

    Args:
        heads: KV heads recorded, None for all.
        entries: the attention calls; and where rows changed places between them, an index `[batch]`: row i goes on as
            a copy of row `index[i]`.
    """

    heads: tuple[int, ...] | None = None
    entries: list[Forward | np.ndarray] = field(default_factory=list)

    @uncompiled
    def note(self, store: PageStore, scores: torch.Tensor | None, is_input: bool) -> None:
        """Take down what `store` holds, and the scores `[batch, kv_heads, pages]` that the policy was told."""
        if self.heads is None:
            self.heads = tuple(range(store.num_heads))
        if max(self.heads) >= store.num_heads:
            raise ValueError(f"heads={list(self.heads)}: the layers of this model have {store.num_heads} KV heads.")
        resident = store.bias == 0
        first = store.positions[:, :, :: store.page_size]
        first = first.masked_fill(~resident.unflatten(2, (-1, store.page_size)).any(-1), -1)
        unstamped = store.priority.new_full((*first.shape[:2], store.pinned_pages), float("nan"))
        stamp = torch.cat([unstamped, store.priority], -1)
        score = torch.full_like(stamp, float("nan")) if scores is None else scores
        page = INPUT if is_input else int(store.positions[0, 0, store.open_slot[0, 0]])
        noted = (first, score.float(), stamp.float(), resident.sum(-1).int())
        arrays = (tensor[:, list(self.heads)].cpu().numpy() for tensor in noted)
        self.entries.append(Forward(store.seen - 1, page, *arrays))

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
