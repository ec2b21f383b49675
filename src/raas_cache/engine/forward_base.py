"""What every kind of forward of a layer does: it stores its tokens once, and reads the pages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from .attention_inputs import Expanded, Seen, Softmax
from .layer_engine import LayerEngine
from .rollback import DecodeNote, PrefillNote


INTERRUPTED = (
    "The last forward with this cache was interrupted: an exception or Ctrl-C stopped it after some layers had stored "
    "its tokens. Call cache.reset() and pass the whole sequence again."
)
NOT_CAUSAL = (
    "attention_mask is not causal among the new tokens, but tokens that may be taken back need a causal mask: do not "
    "pass assistant_model or prompt_lookup_num_tokens, or call cache.deactivate_past_recording() first."
)


@dataclass
class Stopped:
    """The `pending` forward of a layer after an exception in its attention call.

    It takes the place of the forward, which has a reference to the layer: a reference cycle would keep the buffers of a
    dropped cache alive until the garbage collector runs.

    Args:
        is_at_work: whether the exception came while tokens were being stored and read. Otherwise nothing is stored.
    """

    is_at_work: bool
    awaits_attention = False


class Forward(ABC):
    """Tokens of one forward of one layer, as the attention function sees them.

    Attributes:
        layer: the engine of the layer.
        is_first: whether the rows hold no earlier token. The model's own causal attention over the new tokens is then
            exact, and computes the output.
        new: number of tokens of the forward.
        awaits_attention: whether the attention function has not been called yet.
        is_at_work: whether tokens are being stored and read. An exception leaves it True.
    """

    layer: LayerEngine
    new: int
    awaits_attention: bool
    is_at_work: bool
    is_first = False

    @abstractmethod
    def attend(
        self, query: torch.Tensor, softmax: Softmax, seen: Seen | None = None, expanded: Expanded | None = None
    ) -> torch.Tensor | None:
        """Store the tokens, compute their attention over all stored tokens, and rank the pages.

        A layer that shares the KV of this layer may read a second time. The tokens are then stored already.

        Args:
            query: `[rows, heads, queries, head_dim]`, the queries of the new tokens. A second read may bring the query
                of the last token only.
            seen: what the attention mask says of the new tokens; None if it hides nothing.
            expanded: for a latent, the keys and values that the model expanded from the tensors that `update` returned.

        Returns:
            `[rows, heads, queries, value_dim]`; None after a first forward, whose output the model itself computes.

        Raises:
            ValueError: a draft is read a second time, or tokens that may be taken back are not causal among themselves.
        """

    def stop(self) -> None:
        """Note that an exception has ended the attention call."""
        pending = self.layer.pending
        if pending is not None:
            self.layer.pending = Stopped(pending.is_at_work)

    @property
    def seen_before(self) -> int:
        """Number of tokens before this forward, in the row that has seen the most."""
        return self.layer.table.length_of(self.layer.rows)


class StoringForward(Forward):
    """A forward of a layer with one page table: it stores its tokens once, and reads the pages."""

    def __init__(self, layer: LayerEngine, key: torch.Tensor, value: torch.Tensor):
        self.layer, self.key, self.value, self.new = layer, key, value, key.shape[2]
        self.awaits_attention, self.is_at_work = True, False

    def attend(
        self, query: torch.Tensor, softmax: Softmax, seen: Seen | None = None, expanded: Expanded | None = None
    ) -> torch.Tensor | None:
        seen = seen or {}
        if self.awaits_attention and seen.get("among") is not None and self.layer.records_past:
            raise ValueError(NOT_CAUSAL)
        is_new, self.awaits_attention = self.awaits_attention, False
        self.is_at_work = True
        if is_new:
            self.store(seen)
        output = self.read(query, softmax, expanded)
        self.is_at_work = False
        self.layer.pending = None
        return output

    @abstractmethod
    def store(self, seen: Seen) -> None:
        """Store the tokens."""

    @abstractmethod
    def read(self, query: torch.Tensor, softmax: Softmax, expanded: Expanded | None) -> torch.Tensor | None:
        """Attention over the stored tokens; the policy sees the scores."""

    @abstractmethod
    def hide(self, seen: Seen) -> None:
        """Hide tokens that are stored already: the mask of a latent comes after its tokens."""

    def states(self) -> Expanded:
        """Keys and values of all slots of the rows of this forward, `[rows, kv_heads, slots, head_dim]`."""
        return self.layer.table.states(self.layer.row_index)

    def _note(self, note: type[DecodeNote] | type[PrefillNote]) -> None:
        """Add a rollback note of what the new tokens will overwrite, if the past is recorded."""
        layer = self.layer
        layer.expects_turn = False
        if layer.records_past and layer.table.length:
            layer.table.check_no_pool("Taking tokens back (assisted decoding, crop, rewind)")
            layer.rollback.note(note.before(layer.table, self.new))
        elif layer.rollback.notes:
            layer.rollback.notes.clear()  # forwards without a note make older notes useless
