"""The cache layer of full attention: the layer API of transformers, on top of the engine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from ..attention.dispatch import expect
from ..engine.forward import Decode
from ..engine.forward_base import Forward
from ..engine.layer_engine import LayerEngine
from ..engine.layer_settings import LayerSettings
from ..engine.page_table import PageTable
from ..engine.prefill import truncate
from ..engine.resize import RowFunction, movable
from ..engine.step import rank
from ..engine.traced import is_capturing
from .model_probe import rotation_of_caller


if TYPE_CHECKING:
    from transformers.cache_utils import DummyLayer, LinearAttentionCacheLayerMixin

    from ..tracing.layer_trace import LayerTrace

    AnyLayer = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer  # a layer of any cache


class PagedLayer(CacheLayerMixin):
    """One layer of a `PagedCache`: it has an engine, which has a page table and a rollback.

    Attributes:
        engine: the layer's pages, policy and rollback.
        decode: the forward of all decode steps.
        trace: the trace of the layer, see `raas_cache.record`; None if the layer is not recorded.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False  # the first prefill decides the sizes
    is_initialized: bool

    def __init__(self, settings: LayerSettings):
        self.engine = LayerEngine(settings)
        self.decode = Decode(self.engine)
        super().__init__()
        self._trace: LayerTrace | None = None

    @property
    def parts(self) -> Sequence[PagedLayer]:
        """The paged layers that this layer consists of. An attribute would be a reference cycle."""
        return (self,)

    @property
    def table(self) -> PageTable:
        """The layer's pages."""
        return self.engine.table

    @property
    def settings(self) -> LayerSettings:
        """The layer's settings."""
        return self.engine.settings

    @property
    def trace(self) -> LayerTrace | None:
        """The trace of the layer."""
        return self._trace

    @trace.setter
    def trace(self, trace: LayerTrace | None) -> None:
        self._trace = self.engine.tracer = trace

    @property
    def keys(self) -> torch.Tensor | None:
        """`[batch, kv_heads, slots, head_dim]`, float8 codes viewed as int8; None while the layer is empty.

        transformers (5.17 to 5.24) assigns it to move a layer between devices.
        """
        return None if self.table.kv is None else movable(self.table.kv.keys)

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        kv = self.table.kv
        if kv is not None and keys is not None:
            kv.keys = keys.view(kv.keys.dtype)

    @property
    def values(self) -> torch.Tensor | None:
        """`[batch, kv_heads, slots, value_dim]`, float8 codes viewed as int8; None while the layer is empty."""
        return None if self.table.kv is None else movable(self.table.kv.values)

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        kv = self.table.kv
        if kv is not None and values is not None:
            kv.values = values.view(kv.values.dtype)

    def reset(self) -> None:
        """Forget all tokens, release the buffers and drop the rollback notes."""
        self.engine.reset()
        self.decode = Decode(self.engine)
        if self.trace is not None:
            self.trace.entries.clear()
        self.is_initialized = False

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]  # transformers only reads it
        """Whether all decode steps have the same shapes and addresses."""
        engine = self.engine
        return not (engine.settings.grows or engine.records_past or engine.reads_prefill or engine.tracer is not None)

    @property
    def record_past(self) -> bool:
        """Whether forwards note what they overwrite, so that `crop` can take their tokens back."""
        return self.engine.records_past

    @record_past.setter
    def record_past(self, records: bool) -> None:
        self.engine.records_past = records

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create the buffers without pages for the first key and value; the first prefill adds the pages."""
        if self.table.kv is None:
            self.table.allocate(key_states, value_states, self.engine.batch_size or key_states.shape[0])
        self.has_begun()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Receive the new tokens. Their attention call stores them, see `raas_cache.engine.forward.Decode.begin`.

        Args:
            key_states, value_states: `[rows, kv_heads, new, head_dim]`; RoPE applied to the keys.

        Returns:
            The two arguments, with the forward as attribute `paged_forward`; for a latent, the whole buffers.

        Raises:
            RuntimeError: an exception stopped this layer while it stored tokens.
            ValueError: rows, heads, head sizes, dtypes or device differ from the stored tokens.
        """
        return self.begin(key_states, value_states)[1:]

    def begin(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[Forward, torch.Tensor, torch.Tensor]:
        """As `update`, but also returns the forward, as first result."""
        begun = self.decode.begin(key_states, value_states)
        self.has_begun()
        return begun

    def on_prefill(self, forward: Forward, layer_idx: int, has_warned: bool) -> bool:
        """Prepare the attention call of a forward of layer `layer_idx` that is not a plain decode step.

        Returns:
            `has_warned`, or whether this forward has warned that prefill fills the budget.
        """
        self.has_begun()
        for engine in (part.engine for part in self.parts):
            if engine.policy.uses_rotation and engine.rotation is None:
                engine.rotation = rotation_of_caller(layer_idx, engine.table.signature[2], engine.table.device)
        if not has_warned and (forward.is_first or forward.new > 1):
            has_warned = self.warn_if_prefill_fills_budget(forward.new)
        if forward.is_first or self.engine.is_latent:
            expect(forward)
        return has_warned

    def has_begun(self) -> None:
        """Set the attributes that transformers reads: they are known after the first key and value."""
        self.is_initialized, self.device, self.batch_size = True, self.table.device, self.table.batch_size

    def warn_if_prefill_fills_budget(self, new: int) -> bool:
        """Warn if `new` more prefill tokens leave fewer than `min_decode_pages` pages. Returns whether it warned."""
        settings, counts = self.settings, self.table.counts
        rows = slice(None) if self.engine.rows is None else self.engine.rows.on_host
        prompt_pages = math.ceil((int(counts.prefilled[rows].max(initial=0)) + new) / settings.page_size)
        room, least = settings.room_beside(prompt_pages), settings.min_decode_pages
        if settings.grows or room >= least:
            return False
        # Once decoding has begun, the number of decode pages is settled.
        settled = counts.limit[rows][counts.decoded[rows] > 0]
        decode_pages = int(settled.min()) if settled.size else least
        warnings.warn(
            f"budget={settings.budget} leaves {max(room, 0)} pages of {settings.page_size} tokens beside the "
            f"{prompt_pages} pages of the prompt; the cache holds {decode_pages} decode pages anyway "
            f"(min_decode_pages={least}), {(prompt_pages + decode_pages) * settings.page_size} tokens in total.",
            stacklevel=3,
        )
        return True

    def get_seq_length(self) -> int:
        """Number of tokens seen, with evicted tokens: the next position. A 0-d tensor under `torch.compile`."""
        table = self.table
        if (torch.compiler.is_compiling() or is_capturing()) and not table.is_empty:
            return self.engine.kv.clock[0, 0, 0] + 1  # type: ignore[return-value]
        return 0 if self.engine.admits else table.length_of(self.engine.rows)

    def get_max_length(self) -> int:
        """-1, because the length of the sequence has no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask, which covers the new tokens only: the pages store which tokens are visible."""
        return query_length, self.get_seq_length()

    def activate_past_recording(self) -> None:
        """Note from now on what each forward overwrites, so that `crop` can take its tokens back.

        The next forward of several tokens is prefill (the prompt, or a user's turn). After it, several tokens are a
        draft. This ends when `record_past` is set to False, and with `reset`.
        """
        if self.settings.prompt == "evict":
            raise ValueError(
                "prompt='evict' evicts prompt tokens, so the cache cannot take tokens back: use prompt='pin' or "
                "'select' for assisted decoding and prompt look-up."
            )
        self.engine.records_past = self.engine.expects_turn = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise the error that `crop` would raise, and change nothing.

        Raises:
            ValueError: `tokens_to_remove` is positive. transformers passes a negative number.
            RuntimeError: there are no rollback notes for these tokens, and pages or timestamps have changed since.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove} must be 0 or the negative number of tokens to crop.")
        removable = self.engine.rollback.removable(self.table)
        if -tokens_to_remove > removable:
            raise RuntimeError(
                f"tokens_to_remove={tokens_to_remove}, but RaaSCache can take back only {removable} tokens: "
                "earlier steps evicted pages or changed timestamps without a rollback log. Call "
                "cache.activate_past_recording() before the forwards that you may take back."
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens: the layer is then as if it had never seen them.

        This drops all rollback notes, so earlier tokens cannot be taken back. It raises the errors of `check_crop`.
        """
        self.check_crop(tokens_to_remove)
        engine, table = self.engine, self.table
        if self.trace is not None:
            self.trace.forget(table.length + tokens_to_remove)
        engine.known_mask = None

        def stamp_again(query: torch.Tensor, softmax: object) -> None:
            _, scores = engine.attend_prefill(query, softmax)  # type: ignore[arg-type]
            if table.is_decoding:
                rank(engine, scores, query.shape[2])

        if table.kv is not None:
            engine.rollback.undo(table, -tokens_to_remove, stamp_again)

    def drop_decoded(self, seen: int) -> None:
        """Go back to the first `seen` tokens, which must all be prefill, and drop all decode tokens."""
        self.crop(0)  # drops all notes
        if self.trace is not None:
            self.trace.forget(seen)
        self.engine.known_mask = None
        truncate(self.table, np.full(self.table.batch_size, seen), drops_decoded=True)

    def apply_to_rows(self, function: RowFunction) -> None:
        """Replace the rows of every buffer by the rows that `function` returns for them."""
        if self.trace is not None and self.table.kv is not None:
            self.trace.apply_to_rows(function, torch.arange(self.table.batch_size, device=self.table.device))
        self.engine.known_mask = None
        self.table.apply_to_rows(function)
        self.batch_size = self.table.batch_size
        self.engine.rollback.apply_to_rows(function)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row i a copy of row `beam_idx[i]`, with its pages."""
        self.apply_to_rows(partial(_select, beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`: any index of a tensor's first axis."""
        self.apply_to_rows(lambda state: state[indices.to(state.device) if torch.is_tensor(indices) else indices, ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the copies are adjacent."""
        self.apply_to_rows(lambda state: state.repeat_interleave(repeats, dim=0))


def holding_pages(layers: Iterable[object]) -> list[PagedLayer]:
    """The paged layers of a cache that have buffers; of a layer with groups of KV heads, its parts."""
    paged = (layer for layer in layers if isinstance(layer, PagedLayer))
    return [part for layer in paged for part in layer.parts if part.table.kv is not None]


def _select(index: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return state.index_select(0, index.to(state.device))
