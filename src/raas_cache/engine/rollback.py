"""Take tokens back: a note of what each forward overwrites, from which `crop` restores the state before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

import raas_kernels
from raas_kernels import PagedKV

from .prefill import truncate
from .resize import RowFunction, gathered, map_pages, put_page


if TYPE_CHECKING:
    from .attention_inputs import Softmax
    from .page_table import PageTable


def _put_back(now: torch.Tensor | None, before: torch.Tensor | None, empty: float) -> None:
    """Restore a whole buffer `[batch, kv_heads, pages, ...]`; pages that were added since are empty."""
    if now is not None and before is not None:
        now[:, :, : before.shape[2]] = before
        now[:, :, before.shape[2] :] = empty


def _next_lane(kv: PagedKV) -> torch.Tensor:
    """`[batch, kv_heads, 1, 1]` int64, the place of the next decode token in its page."""
    return ((kv.clock[..., 1] + 1) % kv.page_size)[..., None, None]


@dataclass
class DecodeNote:
    """What one decode step overwrites.

    Args:
        page: `[batch, kv_heads]` int64, the page that the step writes to: the page that it recycles, or the open page.
        contents: a copy of this page, if a row opens a page in this step; otherwise None.
        key_min, key_max: `[batch, kv_heads, 1, head_dim]`, of this page; None if the layer does not keep them.
        priority: `[batch, kv_heads, pages]`, before the step.
        states: `[batch, kv_heads, pages, n]`, before the step; None if the policy has none.
        open_slot: `[batch, kv_heads]`, before the step.
        row_states: `[batch, kv_heads, vectors, head_dim]`, before the step; None if the policy has none.
        open_key: `[batch, kv_heads, 1, head_dim]`, the key that the step overwrites in `open_keys`; None without 4-bit
            codes. A step that codes a full page leaves its exact keys there.
    """

    page: torch.Tensor
    contents: PagedKV | None
    key_min: torch.Tensor | None
    key_max: torch.Tensor | None
    priority: torch.Tensor
    states: torch.Tensor | None
    open_slot: torch.Tensor
    row_states: torch.Tensor | None
    open_key: torch.Tensor | None
    length: ClassVar[int] = 1

    @classmethod
    def before(cls, table: PageTable, length: int) -> DecodeNote:
        """Note what the next decode step on `table` will overwrite (`length` is 1)."""
        kv = table.kv
        assert kv is not None
        page, opens = kv.open_slot // table.page_size, table.counts.decoded % table.page_size == 0
        contents = None
        if opens.any():
            device_opens = torch.from_numpy(opens).to(table.device)[:, None]
            page = torch.where(device_opens, raas_kernels.victim(kv), page)
            contents = gathered(kv, page[..., None])
        index = page[..., None, None]
        key_min, key_max = (
            None if buffer is None else torch.take_along_dim(buffer, index, 2) for buffer in (kv.key_min, kv.key_max)
        )
        states, row_states = (None if buffer is None else buffer.clone() for buffer in (kv.states, kv.row_states))
        open_key = None if kv.open_keys is None else torch.take_along_dim(kv.open_keys, _next_lane(kv), 2)
        return cls(
            page, contents, key_min, key_max, kv.priority.clone(), states, kv.open_slot.clone(), row_states, open_key
        )

    def undo(self, table: PageTable, kept: int, attend: Callable[..., None]) -> int:
        """Put `table` back as it was before the step (`kept` is 0); returns the tokens taken back: 1."""
        table.move_clock(-1, -1)
        kv = table.kv
        assert kv is not None
        if self.contents is None:
            slot = kv.open_slot + (kv.clock[..., 1] + 1) % table.page_size
            kv.bias.scatter_(2, slot[..., None], float("-inf"))
        else:
            put_page(kv, self.page, self.contents)
        if kv.open_keys is not None and self.open_key is not None:
            kv.open_keys.scatter_(2, _next_lane(kv).expand_as(self.open_key), self.open_key)
        index = self.page[..., None, None]
        for held, before in ((kv.key_min, self.key_min), (kv.key_max, self.key_max)):
            if held is not None and before is not None:
                held.scatter_(2, index.expand_as(before), before)
        # Pages that were added since hold nothing: the step may have opened one of them instead of the noted page.
        pages = self.priority.shape[2]
        slots = pages * table.page_size
        kv.bias[:, :, slots:], kv.positions[:, :, slots:] = float("-inf"), -1
        if kv.key_min is not None and kv.key_max is not None:
            empty = 0 if kv.is_packed else float("inf")  # the codes of empty pages are read, and must be finite
            kv.key_min[:, :, pages:], kv.key_max[:, :, pages:] = empty, -empty
        _put_back(kv.priority, self.priority, float("-inf"))
        _put_back(kv.states, self.states, 0)
        kv.open_slot.copy_(self.open_slot)
        if kv.row_states is not None and self.row_states is not None:
            kv.row_states.copy_(self.row_states)
        return 1

    def apply_to_rows(self, function: RowFunction) -> None:
        def moved(buffer: torch.Tensor | None) -> torch.Tensor | None:
            return None if buffer is None else function(buffer)

        self.page, self.priority, self.open_slot = (
            function(buffer) for buffer in (self.page, self.priority, self.open_slot)
        )
        self.states, self.row_states, self.key_min, self.key_max, self.open_key = (
            moved(buffer) for buffer in (self.states, self.row_states, self.key_min, self.key_max, self.open_key)
        )
        if self.contents is not None:
            self.contents = map_pages(self.contents, lambda buffer, entries, empty: function(buffer))


@dataclass
class PrefillNote:
    """What the prefill of one forward overwrites: a user's turn, followed by the first draft.

    Args:
        length: number of tokens of the forward.
        priority, states: as in `DecodeNote`, before the forward.
        tail: `[batch, kv_heads]` int64, the last pinned page, and `tail_contents`, a copy of it. None without 4-bit
            codes: only their prefill changes the codes of tokens that are already in this page.
        reads: the attention calls of the forward: query `[rows, heads, length, head_dim]`, and settings of the softmax.
    """

    length: int
    priority: torch.Tensor
    states: torch.Tensor | None
    tail: torch.Tensor | None = None
    tail_contents: PagedKV | None = None
    reads: list[tuple[torch.Tensor, Softmax]] = field(default_factory=list)

    @classmethod
    def before(cls, table: PageTable, length: int) -> PrefillNote:
        """Note what a forward of `length` prefill tokens will overwrite."""
        kv = table.kv
        assert kv is not None
        note = cls(length, kv.priority.clone(), None if kv.states is None else kv.states.clone())
        if kv.is_packed and kv.num_pages:
            pinned = table.counts.pinned
            last = np.where(pinned, np.arange(pinned.shape[1]), 0).max(1)
            note.tail = torch.from_numpy(last).to(table.device)[:, None].expand(-1, table.num_heads).contiguous()
            note.tail_contents = gathered(kv, note.tail[..., None])
        return note

    def undo(self, table: PageTable, kept: int, attend: Callable[..., None]) -> int:
        """Take back all but the first `kept` tokens, and their effect on priorities. Returns the number removed."""
        removed = self.length - kept
        truncate(table, table.counts.seen - removed, drops_decoded=False)
        kv = table.kv
        assert kv is not None
        if not kept and self.tail is not None and self.tail_contents is not None:
            put_page(kv, self.tail, self.tail_contents)
        if table.is_decoding:
            pages = min(self.priority.shape[2], table.num_pages)
            _put_back(kv.priority, self.priority[:, :, :pages], float("-inf"))
            _put_back(kv.states, None if self.states is None else self.states[:, :, :pages], 0)
        if kept:
            for query, softmax in self.reads:
                attend(query[:, :, :kept], softmax)
        return removed

    def apply_to_rows(self, function: RowFunction) -> None:
        self.priority = function(self.priority)
        self.states = None if self.states is None else function(self.states)
        self.reads = [(function(query), softmax) for query, softmax in self.reads]
        if self.tail is not None and self.tail_contents is not None:
            self.tail = function(self.tail)
            self.tail_contents = map_pages(self.tail_contents, lambda buffer, entries, empty: function(buffer))


class Rollback:
    """Notes of the newest forwards, the newest last, and at most `limit` of them."""

    def __init__(self, limit: int):
        self.limit = limit
        self.notes: list[DecodeNote | PrefillNote] = []

    def note(self, note: DecodeNote | PrefillNote) -> None:
        """Add the note of the next forward, and drop the oldest note if there are too many."""
        self.notes.append(note)
        del self.notes[: -self.limit]

    def note_read(self, query: torch.Tensor, softmax: Softmax) -> None:
        """Add an attention call to the note of the newest prefill; `undo` repeats it for the tokens that stay."""
        newest = self.notes[-1] if self.notes else None
        if isinstance(newest, PrefillNote) and query.shape[2] == newest.length:
            newest.reads.append((query.detach(), softmax))

    def removable(self, table: PageTable) -> int:
        """Number of tokens that `undo` can take back."""
        if table.settings.prompt == "evict":  # no note has the pages that a prefill evicted
            return 0
        steps = sum(isinstance(note, DecodeNote) for note in self.notes)
        # If the notes cover all decode steps, prefill tokens before them can be removed without a note.
        if steps == int(table.counts.decoded.max(initial=0)):
            return int(table.counts.seen.min(initial=table.length))
        return sum(note.length for note in self.notes)

    def undo(self, table: PageTable, tokens: int, attend: Callable[..., None]) -> None:
        """Take back the last `tokens` tokens, at most `removable`, and drop all notes.

        Args:
            attend: called with the queries of the prefill tokens that stay, and the softmax settings. It updates the
                priorities for these tokens again.
        """
        while tokens and self.notes:
            note = self.notes.pop()
            tokens -= note.undo(table, max(0, note.length - tokens), attend)
        if tokens:
            counts = table.counts
            truncate(table, np.maximum(counts.seen - tokens, 0), drops_decoded=False)
        self.notes.clear()

    def apply_to_rows(self, function: RowFunction) -> None:
        for note in self.notes:
            note.apply_to_rows(function)
