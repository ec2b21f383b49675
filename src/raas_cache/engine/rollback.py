"""Taking tokens back: what is noted of a page store while the past is recorded, so that `crop` leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

import raas_kernels

from .page_table import BOUNDS, EMPTY, EVICTABLE, SLOTS


if TYPE_CHECKING:
    from .page_table import PageStore, RowFunction
    from .paged_attention import Softmax

PAGED = (*SLOTS, *BOUNDS)


def _pages_of(store: PageStore, name: str) -> torch.Tensor:
    """A paged tensor as `[batch, kv_heads, pages, width]`, in place."""
    tensor: torch.Tensor = getattr(store, name)
    return tensor.view(*tensor.shape[:2], store.pinned_pages + store.decode_pages, -1)


def _restore(store: PageStore, name: str, before: torch.Tensor) -> None:
    """Put a whole tensor back; pages that a store has grown by since hold nothing."""
    tensor = getattr(store, name)
    if tensor.shape != before.shape:
        tensor[:, :, before.shape[2] :] = EMPTY.get(name, 0)
        tensor = tensor[:, :, : before.shape[2]]
    tensor.copy_(before)


@dataclass
class Step:
    """What one decode step overwrites: the page it recycles if it opens one, otherwise the open page's bounds.

    Args:
        page: `[batch, kv_heads]` int64, index of that page.
        state: name -> tensor of the store as it was: that page's contents `[batch, kv_heads, width]`, and the whole
            `priority`, `page_state` and `open_slot`.
    """

    page: torch.Tensor
    state: dict[str, torch.Tensor]
    length: ClassVar[int] = 1

    @classmethod
    def about_to_append(cls, store: PageStore) -> Step:
        """Note what the next `append` on `store`, and the stamps after it, will overwrite."""
        opening = store.decoded % store.page_size == 0
        if opening:
            page = raas_kernels.victim(store.positions, store.priority, store.page_size) + store.pinned_pages
        else:
            page = store.open_slot // store.page_size
        state = {name: tensor.clone() for name, tensor in store.held_tensors(*EVICTABLE, "open_slot").items()}
        for name in store.held_tensors(*(PAGED if opening else BOUNDS)):
            state[name] = torch.take_along_dim(_pages_of(store, name), page[..., None, None], 2).squeeze(2)
        return cls(page, state)

    def undo(self, store: PageStore, kept: int, attend: Callable[..., torch.Tensor]) -> int:
        """Put `store` back as it was before the step (`kept` is 0); returns the tokens taken back: 1."""
        store.retract()
        # The token's slot, in case the page stays: a page that goes brings its own bias back.
        slot = store.open_slot[..., None] + store.decoded % store.page_size
        store.bias.scatter_(2, slot, float("-inf"))
        for name, before in self.state.items():
            if name in PAGED:
                index = self.page[..., None, None].expand_as(before[:, :, None])
                _pages_of(store, name).scatter_(2, index, before[:, :, None])
            else:
                _restore(store, name, before)
        return 1

    def apply_to_rows(self, function: RowFunction) -> None:
        self.page = function(self.page)
        self.state = {name: function(tensor) for name, tensor in self.state.items()}


@dataclass
class Turn:
    """Input tokens pinned in one forward after the first: a user's turn with the first draft behind it.

    Args:
        length: tokens of the forward.
        state: name -> the store's `priority` and `page_state` before the forward.
        reads: the attention calls of the forward: query, and settings of the softmax.
    """

    length: int
    state: dict[str, torch.Tensor]
    reads: list[tuple[torch.Tensor, Softmax]] = field(default_factory=list)

    def undo(self, store: PageStore, kept: int, attend: Callable[..., torch.Tensor]) -> int:
        """Take back all but the first `kept` tokens, and the stamps of those; returns the tokens taken back."""
        store.unpin(self.length - kept)
        if store.is_decoding:
            for name, before in self.state.items():
                _restore(store, name, before)
        if kept:
            for query, softmax in self.reads:
                attend(query[:, :, :kept], **softmax)
        return self.length - kept

    def apply_to_rows(self, function: RowFunction) -> None:
        self.state = {name: function(tensor) for name, tensor in self.state.items()}
        self.reads = [(function(query), softmax) for query, softmax in self.reads]


class Past:
    """The steps and turns that can be taken back, the newest last: at most `limit` of them, the oldest go."""

    def __init__(self, limit: int):
        self.limit = limit
        self.entries: list[Step | Turn] = []

    def note(self, store: PageStore, length: int, pin: bool) -> None:
        """Called before `store` stores `length` tokens, as input (`pin`) or as one decode step."""
        if pin:
            before = {name: tensor.clone() for name, tensor in store.held_tensors(*EVICTABLE).items()}
            self.entries.append(Turn(length, before))
        else:
            self.entries.append(Step.about_to_append(store))
        del self.entries[: -self.limit]

    def note_read(self, query: torch.Tensor, softmax: Softmax) -> None:
        """Called before the attention of the tokens stored last: a turn's stamps are given again after a crop."""
        turn = self.entries[-1] if self.entries else None
        if isinstance(turn, Turn) and query.shape[2] == turn.length:
            turn.reads.append((query.detach(), softmax))

    def removable(self, store: PageStore) -> int:
        """Tokens that `undo` can take back."""
        if store.prompt == "evict":  # of what was cut away there is no record
            return 0
        steps = sum(isinstance(entry, Step) for entry in self.entries)
        # As long as no token was generated, input alone is held: it can go without a record.
        return store.seen if steps == store.decoded else sum(entry.length for entry in self.entries)

    def undo(self, store: PageStore, tokens: int, attend: Callable[..., torch.Tensor]) -> None:
        """Take back the last `tokens` tokens, at most `removable`, and forget how to take back those before them.

        Args:
            attend: gives the stamps of stored tokens again, called with their queries and the settings noted.
        """
        while tokens and self.entries:
            entry = self.entries.pop()
            tokens -= entry.undo(store, max(0, entry.length - tokens), attend)
        if tokens:
            store.unpin(tokens)
        self.entries.clear()

    def apply_to_rows(self, function: RowFunction) -> None:
        for entry in self.entries:
            entry.apply_to_rows(function)
