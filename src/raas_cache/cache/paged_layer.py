"""The cache layer of full attention: transformers' contract on top of the pages and their attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import CacheLayerMixin

import raas_kernels

from ..engine.layer_settings import LayerSettings
from ..engine.page_table import uncompiled
from ..engine.paged_attention import PagedAttention
from ..engine.rollback import Past


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..engine.page_table import RowFunction
    from ..engine.paged_attention import Expanded, Softmax

INTERRUPTED = (
    "The last forward on this cache did not end: an exception or Ctrl-C stopped it after some layers had stored its "
    "tokens. Call reset() on the cache and give it the sequence from its beginning."
)
NOT_PREALLOCATED = (
    "This cache takes memory as its chain grows, which a compiled step cannot do: call cache.preallocate() before the "
    "first forward. (generate does so by itself where it compiles.)"
)
Draft = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Keys, values and what of them is visible, see `PagedLayer.admit`."""


class PagedLayer(PagedAttention, CacheLayerMixin):
    """One layer's KV in pages, their attention (see `PagedAttention`), drafts, and taking tokens back."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False  # the sizes wait for the prompt's length
    keys: torch.Tensor  # as the store says
    values: torch.Tensor
    new: int
    is_initialized: bool
    awaits_attention: bool
    is_first_forward: bool
    record_past: bool
    reads_input: bool

    def __init__(self, settings: LayerSettings):
        CacheLayerMixin.__init__(self)
        PagedAttention.__init__(self, settings)
        self.reset()

    def reset(self) -> None:
        """Forget everything, buffers and recording included: the next prompt sizes new ones."""
        self.release()
        if self.recorder is not None:
            self.recorder.entries.clear()
        self.is_initialized = False
        # Between `update` and `attend`: whether the attention function has yet to come, and whether it is at work.
        self.awaits_attention = self.is_busy = False
        # Whether single tokens are input, too, see `PagedCache.prefilling`.
        self.reads_input = False
        # The mask whose view of the past the bias has, see `PastMask`; None where something else has written to it.
        self.obeys: object = None
        # Called by the first attention with its module, key and value, while the cache does not know the model.
        self.on_module: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], object] | None = None
        self.record_past = self._expects_turn = False
        # Whether all tokens held came with the last `update`: plain causal attention over them is then exact.
        self.is_first_forward = False
        # What `update` took and `admit` stores: nothing of it is in the store if its attention never comes.
        self._taken: tuple[torch.Tensor, torch.Tensor] | None = None
        self._was_input = False
        # While recording, enough to take back a budget of tokens, so that recording left on stays O(budget) too.
        self._past = Past(self.budget)
        self._draft: Draft | None = None

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]  # transformers only reads it
        """Whether a decode step has the shapes, and its buffers the places, of the one before it."""
        return not (self.grows or self.record_past or self.reads_input or self.recorder is not None)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take batch, heads, sizes, dtype and device from the first key and value; `update` sizes the buffers."""
        self.allocate(key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the new tokens; `admit` stores them and `attend` then reads the store.

        A single token after the first forward is a generated one, unless `reads_input` says otherwise; several are
        input. While the past is recorded, several are a draft: generated tokens, stored one by one in `attend`. Only
        the first forward after `activate_past_recording` is input then, for generation starts with it (not so a
        latent's, which would have to be expanded again to give its stamps again).

        Args:
            key_states, value_states: `[batch, kv_heads, new, head_dim]`; RoPE applied to the keys.

        Returns:
            The two arguments, each with this layer as attribute `paged_layer`, for the attention function. If the
            model expands what it caches (`is_latent`), the whole buffers instead, a draft behind them.

        Raises:
            RuntimeError: an exception stopped this layer while it stored tokens.
            ValueError: batch, heads, head sizes, dtypes or device are not those the cache was filled with.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.check_same_use(key_states, value_states)
        if self.is_busy:
            raise RuntimeError(INTERRUPTED)
        key, value = key_states, value_states
        if key.requires_grad or value.requires_grad:
            key, value = key.detach(), value.detach()
        self.is_first_forward, self.new = not self.is_filled, key.shape[2]
        self.awaits_attention = True
        self._taken = key, value
        if self.is_latent:  # the model expands the store before `admit` is called
            self.is_busy = True
            self._store(None)
            if not self.is_first_forward:
                keys, values = self.states()
                if self._draft is None:
                    return keys, values
                return torch.cat([keys, key], 2), torch.cat([values, value], 2)
        key_states.paged_layer = value_states.paged_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def admit(self, visible: torch.Tensor | None, among: torch.Tensor | None = None) -> None:
        """The attention of the last `update` has come, and says what it may see: store the tokens for good.

        Args:
            visible: `[batch, new]` bool, False where the attention mask hides a token; None if it hides none.
            among: `[batch, new, new]` bool, whether a new token sees another; None for causal.

        Raises:
            ValueError: the tokens are not causal among themselves, and are a draft or may be taken back.
        """
        if among is not None and self.record_past:
            raise ValueError(
                "attention_mask is not causal among the new tokens, and they may be taken back: leave out "
                "assistant_model and prompt_lookup_num_tokens, or call cache.deactivate_past_recording() first."
            )
        self.awaits_attention, self.is_busy, self.among = False, True, among
        if self._taken is not None:
            self._store(visible)
        elif visible is None:
            return
        elif self._draft is not None:
            self._draft = *self._draft[:2], visible
        elif self._was_input:
            self.hide(visible)
        else:
            self.hide_generated(visible[:, 0].expand(self.batch_size))

    def _store(self, visible: torch.Tensor | None) -> None:
        assert self._taken is not None
        (key, value), self._taken = self._taken, None
        self._was_input = self.is_first_forward or self.new > 1 or self.reads_input
        if self._was_input:
            self._store_input(key, value, visible)
        else:
            self._store_generated(key, value, None if visible is None else visible[:, 0].expand(self.batch_size))

    @uncompiled
    def _store_input(self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None) -> None:
        is_turn, self._expects_turn = (self._expects_turn and not self.is_latent) or self.reads_input, False
        if self.record_past and self.is_filled and not is_turn:
            self._draft = key, value, visible
            return
        self._note(key.shape[2], pin=True)
        self.pin(key, value, visible)

    def _store_generated(self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None = None) -> None:
        self._expects_turn = False
        if self.decode_pages < self.limit:
            if torch.compiler.is_compiling():
                raise RuntimeError(NOT_PREALLOCATED)
            self.make_room()
        self._note(1, pin=False)
        self.append(key, value, visible)

    def _note(self, length: int, pin: bool) -> None:
        """Before tokens are stored: note what they overwrite, while the past is recorded."""
        if self.record_past and self.is_filled:
            self._past.note(self, length, pin)
        elif self._past.entries:
            self._past.entries.clear()  # what was noted before would be undone in the wrong place

    def attend(
        self,
        query: torch.Tensor,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        expanded: Expanded | None = None,
    ) -> torch.Tensor:
        """Attention of the new tokens over all resident ones; then the policy sees the pages' scores.

        Args:
            query: `[batch, heads, new, head_dim]`, the queries of the tokens of the last `update`; a layer that shares
                this one's KV may come for a second read, and with the last token's query only.
            scale: factor on `q . k`.
            softcap: logits become `softcap * tanh(logits / softcap)`, or None.
            sinks: `[heads]`, one more logit in each head's softmax with nothing behind it, or None.
            expanded: for a latent, what the model made of the tensors that `update` returned:
                `[batch, heads, slots (+ draft), head_dim]`.

        Returns:
            `[batch, heads, new, value_dim]`, in the query's dtype.

        Raises:
            ValueError: a draft is read a second time (KV sharing between layers), when it is decoded already.
        """
        softmax: Softmax = {"scale": scale, "softcap": softcap, "sinks": sinks}
        self.is_busy = True
        if self._draft is not None:
            output = self._attend_draft(self._draft, query, expanded, **softmax)
        elif query.shape[2] > self.new:
            raise ValueError(
                "This model shares the KV of a layer with another layer: RaaSCache serves that for one token at a "
                "time, not for drafts. Leave out assistant_model / prompt_lookup_num_tokens."
            )
        else:
            if self._past.entries:
                self._past.note_read(query, softmax)
            output = self.attend_stored(query, expanded, **softmax)
        self.is_busy = False
        return output

    def attend_first(self, query: torch.Tensor, expanded: Expanded, **softmax: Unpack[Softmax]) -> None:
        """After the first forward, whose attention is the model's own; see `PagedAttention.attend_first`."""
        super().attend_first(query, expanded, **softmax)
        self.is_busy = False

    @uncompiled
    def _attend_draft(
        self, draft: Draft, query: torch.Tensor, expanded: Expanded | None, **softmax: Unpack[Softmax]
    ) -> torch.Tensor:
        """Drafted tokens are decoded one after the other, so that what is kept is what plain decoding would hold."""
        (key, value, visible), self._draft = draft, None
        if expanded is not None:
            slots = self.keys.shape[2]
            drafted = [states[:, :, slots:] for states in expanded]
            keys, values = (states[:, :, :slots].clone() for states in expanded)
            expanded = keys, values
        outputs = []
        for token in (slice(i, i + 1) for i in range(key.shape[2])):
            shown = None if visible is None else visible[:, token.start]
            self._store_generated(key[:, :, token], value[:, :, token], shown)
            if expanded is not None:
                slot = self.open_slot + (self.decoded - 1) % self.page_size
                for whole, new in zip(expanded, drafted, strict=True):
                    whole.scatter_(2, slot[:, :, None, None].expand_as(new[:, :, token]), new[:, :, token])
            outputs.append(self.attend_stored(query[:, :, token], expanded, **softmax))
        return torch.cat(outputs, 2)

    @property
    def pages_with_input(self) -> int:
        """Pinned pages once the tokens of the last `update` are stored, if they are input."""
        taken = 0 if self._taken is None else self.new
        return math.ceil((self.pinned + taken) / self.page_size)

    @property
    def seen_before(self) -> int:
        """Tokens of the sequence before the last `update`, whose tokens have yet to be stored (a latent's have not)."""
        return self.seen - (self.new if self._taken is None and self._draft is None else 0)

    def show(self, visible: torch.Tensor) -> None:
        """Let attention read the held tokens that `visible` `[batch, tokens]` names, by position, and no others."""
        self.obeys = None
        raas_kernels.show([self.held()], visible)

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included: positions go on from here. A 0-d tensor while `torch.compile` traces."""
        if torch.compiler.is_compiling() and self.is_filled:
            return self.clock[0, 0, 0] + 1  # type: ignore[return-value]
        return self.seen

    def get_max_length(self) -> int:
        """-1: however small the store, the sequence may go on."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask: the new tokens only, for what is visible of the past is known here."""
        return query_length, self.get_seq_length()

    def activate_past_recording(self) -> None:
        """From now on note what each forward overwrites, so that `crop` can take its tokens back.

        The next forward may be of several tokens that are input (the prompt, a turn); after it, several tokens are a
        draft. Recording ends when `record_past` is set to False, and with `reset`.
        """
        if self.prompt == "evict":
            raise ValueError(
                "prompt='evict' drops input for good, so that no token could be taken back: for assisted decoding and "
                "prompt look-up use prompt='pin' or 'select'."
            )
        self.record_past = self._expects_turn = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what `crop` would raise, and do nothing.

        Raises:
            ValueError: `tokens_to_remove` is positive: transformers counts them below zero.
            RuntimeError: the past of these tokens was not recorded, and pages may have been evicted or stamped since.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove} must be 0 or the negative number of tokens to crop.")
        removable = self._past.removable(self)
        if -tokens_to_remove > removable:
            raise RuntimeError(
                f"tokens_to_remove={tokens_to_remove}, but RaaSCache can take back only {removable} tokens: later ones "
                "have evicted or stamped pages, and that was not recorded. Call cache.activate_past_recording() before "
                "the forwards that are to be taken back."
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens: the layer is then as if it had never seen them.

        Also forgets how to take back the tokens before them. Raises as `check_crop` does.
        """
        self.check_crop(tokens_to_remove)
        if self.recorder is not None:
            self.recorder.forget(self.seen + tokens_to_remove)
        self.obeys = None
        self._past.undo(self, -tokens_to_remove, partial(self._attend_input, observed=None, expanded=None))

    def apply_to_rows(self, function: RowFunction) -> None:
        """Make every tensor that has rows what `function` makes of it."""
        if self.recorder is not None and self.is_initialized:
            self.recorder.apply_to_rows(function, torch.arange(self.batch_size, device=self.device))
        self.obeys = None
        super().apply_to_rows(function)
        self._past.apply_to_rows(function)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`, its page table included."""
        self.apply_to_rows(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`, in any form that indexes a tensor."""
        self.apply_to_rows(lambda state: state[indices.to(state.device) if torch.is_tensor(indices) else indices, ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        self.apply_to_rows(lambda state: state.repeat_interleave(repeats, dim=0))
