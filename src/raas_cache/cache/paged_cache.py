"""`PagedCache`: the transformers `Cache` API over paged layers, nothing else.

In order: settings and their checks, `update` and what the first attention call teaches, offloading, what can be asked
of a cache, and the rest of the API (reset, recording the past, crop). Names and arguments of the `Cache` API are
upstream's; a new option is checked here and goes into `LayerSettings`, what it does belongs into the layer or below.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ..attention.dispatch import DISPATCHED, expect
from ..engine.forward import INTERRUPTED, Forward, begin
from ..engine.layer_engine import LayerEngine
from ..engine.layer_settings import LayerSettings
from ..engine.policy import Policy
from ..engine.row_counts import Rows
from . import inspection
from .layer_types import NEEDS_CONFIG, LayersToCome, learn_layers, plan_layers, warn_if_nothing_is_paged
from .model_probe import (
    calling_module,
    can_compile,
    check_caller,
    check_checkpointing,
    check_generate_step,
    generate_compiles,
    is_asked_by_generate,
    length_to_tell,
)
from .paged_layer import PagedLayer
from .past_mask import PastMask, tagged
from .rows import TouchedRows, checked_rows
from .settings import Budget, check_offloading, checked_config, checked_settings, property_of_an_instance


if TYPE_CHECKING:
    from ..tracing.recording import Recording
    from .layer_types import AnyLayer


class PagedCache(Cache):
    """A KV cache in pages, whose policy says which page goes when the budget is full.

    Time and memory a step are O(budget), however many tokens have been seen, for every policy that evicts. As long as
    nothing is evicted, outputs are `DynamicCache`'s.

    Args:
        budget (`int`, or a list of them): tokens to hold for each row, layer and KV head, the prompt counted in; at
            least one page. For a method that never evicts: tokens to read. A list has an entry for each layer of the
            model (see `learn_budgets`); those of layers without full attention are not used.
        policy (`Policy`): the method, for example `H2OPolicy()`; `RaaSCache`, `QuestCache` and the like bring theirs.
        page_size (`int`): tokens a page, a power of two.
        scoring (`str`): `"exact"` scores a page by its tokens' softmax weights; `"minmax"` by the softmax over min/max
            representatives of the pages.
        granularity (`str`, *optional*): `"head"` evicts for every KV head by itself; `"layer"` for all heads of a row
            alike. By default what the method's paper does.
        min_decode_pages (`int`): decode pages held even where the prompt leaves room for fewer (a warning says so).
        prompt (`str`, *optional*): by default what the method's paper does.

            - `"pin"`: input is never evicted, and always read.
            - `"select"`: input is never evicted; a decode step reads those of its pages whose min/max bounds are
              highest, at most half of the budget. O(budget) time and O(prompt + budget) memory for any prompt.
            - `"evict"`: once a forward of input is over, its pages compete like all others, but for the first page, the
              sink. O(budget) memory, however long the prompt. Takes no assisted decoding.
        kv_dtype (`str`, *optional*): hold K and V as `"int8"` or `"fp8"` codes, with a scale for each token and head;
            by default in the model's dtype.
        config (`PreTrainedConfig`, *optional*): the model's config. Says which layers have full attention and so
            are paged; the others (sliding windows, linear attention, layers that share another's KV) keep the cache
            that transformers gives them. Without it the first attention call tells; needed by models whose first
            layer has linear attention (an error says so).
        offloading (`bool`): keep each layer's K and V in CPU memory while other layers run. Needs a CUDA GPU.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, the method cannot do what it asks for,
            or `config` has a layer type that this cache cannot hold.
    """

    budget: int | tuple[int, ...]
    settings: LayerSettings
    layers: "list[AnyLayer]"

    def __init__(
        self,
        budget: Budget,
        *,
        policy: Policy,
        page_size: int = 16,
        scoring: Literal["exact", "minmax"] = "exact",
        granularity: Literal["head", "layer"] | None = None,
        min_decode_pages: int = 8,
        prompt: Literal["pin", "select", "evict"] | None = None,
        kv_dtype: Literal["int8", "fp8"] | None = None,
        config: PreTrainedConfig | None = None,
        offloading: bool = False,
    ):
        self.budget, self.settings = checked_settings(
            budget, policy, page_size, scoring, granularity, min_decode_pages, prompt, kv_dtype
        )
        config = checked_config(config)
        check_offloading(offloading)
        layers = LayersToCome() if config is None else plan_layers(config, self._settings_of)
        super().__init__(layers=layers, offloading=offloading)
        self._config = config
        self._recording: Recording | None = None
        self._preallocates = self._reads_prefill = False
        self._rows: TouchedRows | None = None
        self._forget()
        if config is not None:
            warn_if_nothing_is_paged(self.layers, config.model_type, self.budget)

    def _forget(self) -> None:
        """What has been learnt of a model and its sequence; another may come after `reset`."""
        self._records_past = False
        self._handed_out: LayerEngine | None = None  # of the layer that updated last
        self._last_idx, self._tokens_before = -1, 0  # of that layer, and of the forward that it is in
        self._is_torn = False  # whether only some of the layers have had their rows changed
        self._past_mask = PastMask()
        self._not_offloaded: int | None = None
        self._warned = False
        self._suits_model: bool | None = None  # whether the model's decode step can be compiled; None: not yet asked

    def _settings_of(self, layer_idx: int) -> LayerSettings:
        budget = self.budget
        if isinstance(budget, tuple):
            if layer_idx >= len(budget):
                raise ValueError(
                    f"budget={budget} has {len(budget)} entries, but the model has a layer {layer_idx}: give one entry "
                    "per layer."
                )
            budget = budget[layer_idx]
        return replace(self.settings, budget=budget, policy=self.settings.policy.for_layer(layer_idx))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens of a layer, and hand the layer to the attention function (see `PagedLayer.update`).

        Raises:
            RuntimeError: the attention implementation did not take what the last update handed out, or the last
                forward did not end.
            ValueError: batch size, dtypes or device differ from those of the tokens held, or the model would misuse or
                drop the cache (see `check_caller`).
        """
        self._check_last_forward(layer_idx)
        layers, is_compiling = self.layers, torch.compiler.is_compiling()
        if layer_idx == 0 and not is_compiling:
            is_empty = not (layers and layers[0].is_initialized)  # type: ignore[union-attr]  # has attention
            if is_empty or key_states.shape[2] > 1:
                seen = 0 if is_empty else self.get_seq_length()
                check_caller(self, seen, key_states.shape[2], inspect.currentframe())
        while len(layers) <= layer_idx:
            self._add(PagedLayer(self._settings_of(len(layers))))
        layer = layers[layer_idx]
        if not isinstance(layer, PagedLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        engine = layer.engine
        if not is_compiling:
            # A forward that an exception ended has reached some of the layers only.
            if layer_idx <= self._last_idx or self._last_idx < 0:  # a forward begins
                self._tokens_before = engine.table.tokens
            elif engine.table.tokens != self._tokens_before:
                raise RuntimeError(INTERRUPTED)
            self._last_idx = layer_idx
        if self._reads_prefill or self._preallocates or self._recording is not None or self._rows is not None:
            self._prepare(layer, layer_idx, key_states.device)
        if self.offloading:
            layer.prefetch()
            keys, values = super().update(key_states, value_states, layer_idx)
            forward = engine.pending
        else:
            forward, keys, values = begin(layer.decode, key_states, value_states)
        if forward is not layer.decode:
            self._on_prefill(layer, layer_idx, forward)  # type: ignore[arg-type]  # it has just begun
        self._handed_out = engine
        return keys, values

    def _prepare(self, layer: PagedLayer, layer_idx: int, device: torch.device) -> None:
        """Tell a layer what has been asked of the cache."""
        engine = layer.engine
        engine.reads_prefill, engine.table.preallocates = self._reads_prefill, self._preallocates
        if self._recording is not None and layer.trace is None:
            layer.trace = self._recording.trace_of(layer_idx)
        if self._rows is not None:
            self._rows.prepare(engine, device)

    def _on_prefill(self, layer: PagedLayer, layer_idx: int, forward: Forward) -> None:
        layer.has_begun()
        if not self._warned and (forward.is_first or forward.new > 1):
            self._warned = layer.warn_if_prefill_fills_budget(forward.new)
        if not self._knows_layers:
            layer.engine.on_module = partial(self._learn_layers, layer_idx)
        if forward.is_first or layer.engine.is_latent:
            expect(forward)

    def _check_last_forward(self, layer_idx: int) -> None:
        """Refuse to go on where what was handed out last was not read, or rows were changed in some layers only."""
        if self._is_torn:
            raise RuntimeError(INTERRUPTED)
        last = self._handed_out
        if last is None or last.pending is None or not last.pending.awaits_attention:
            return
        config = getattr(calling_module(torch.nn.Module), "config", None)
        # The next layer finds out, unless the model has no other: that the same layer comes again is a new forward.
        is_only_layer = not self._paged_layers[0].table.tokens and getattr(config, "num_hidden_layers", None) == 1
        if layer_idx <= self._last_idx and not is_only_layer:
            raise RuntimeError(INTERRUPTED)
        implementation = "in use" if config is None else repr(config._attn_implementation)
        raise RuntimeError(
            f"The attention implementation {implementation} did not read the paged cache, so its output "
            'would be wrong. Call model.set_attn_implementation("raas") (or "sdpa") and generate again with a new '
            "cache. A model whose attention bypasses transformers' attention interface, or that changes its keys "
            "between cache and attention, needs a DynamicCache."
        )

    @property
    def _knows_layers(self) -> bool:
        return not isinstance(self.layers, LayersToCome)

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        """While the context lasts, every token is input, also those that come one by one.

        A cache sees tokens, not their roles. Without this, the first forward is input, later forwards of several
        tokens are input (a turn, a chunk of the prompt), and later forwards of one token are generated tokens, which
        may be evicted. A prompt that is fed token by token needs this. With `prompt="evict"` it changes nothing,
        for there input competes as generated tokens do. Steps inside the context are not compiled.

        Example:

        ```python
        >>> with cache.prefilling():
        ...     for token in prompt_ids.split(1, dim=1):
        ...         logits = model(token, past_key_values=cache).logits
        ```
        """
        before, self._reads_prefill = self._reads_prefill, self.settings.prompt != "evict"
        try:
            yield
        finally:
            self._reads_prefill = before
            for layer in self.layers:
                if isinstance(layer, PagedLayer):
                    layer.engine.reads_prefill = before

    @contextmanager
    def on_rows(self, rows: int | Sequence[int]) -> Iterator[None]:
        """While the context lasts, forwards touch the rows `rows` of the cache only: their batch is as long as `rows`.

        Give the model `position_ids=cache.seen_tokens[rows, None]`, for each row stands at a step of its own, and no
        `attention_mask`.

        Args:
            rows: the rows, in the order of the forward's batch.

        Raises:
            TypeError, ValueError: `rows` are no rows of the cache; a layer of the model is not paged; or the cache is
                being recorded, or notes what it overwrites.
        """
        with self._touching(rows, None, admits=False):
            yield

    @contextmanager
    def admit(self, rows: int | Sequence[int], batch_size: int | None = None) -> Iterator[None]:
        """While the context lasts, forwards prefill the rows `rows`; whatever these rows held goes.

        The other rows stay as they are, so that a sequence can begin while others are being decoded.

        Args:
            rows: the rows, in the order of the forward's batch.
            batch_size: rows of the cache, where it is empty; by default just enough for `rows`.

        Raises:
            TypeError, ValueError: as `on_rows`; or `batch_size` is not the number of rows that the cache has.

        Example:

        ```python
        >>> with cache.admit(0, batch_size=2):
        ...     model(first_prompt, past_key_values=cache)
        >>> with cache.on_rows(0):
        ...     model(token, position_ids=cache.seen_tokens[:1, None], past_key_values=cache)
        >>> with cache.admit(1):
        ...     model(second_prompt, past_key_values=cache)
        >>> model(tokens, position_ids=cache.seen_tokens[:, None], past_key_values=cache)
        ```
        """
        with self._touching(rows, batch_size, admits=True):
            yield

    def release_rows(self, rows: int | Sequence[int]) -> None:
        """Forget the rows `rows`; `admit` can fill them again.

        Raises:
            TypeError, ValueError: `rows` are no rows of the cache.
        """
        layers = self._paged_layers
        if not layers:
            raise ValueError(f"rows={rows}: the cache is empty, so there is no row to release.")
        indices = checked_rows(rows, layers[0].table.batch_size)
        with self._all_or_none():
            for layer in layers:
                layer.table.release_rows(Rows.of(indices, layer.table.device))
                layer.engine.known_mask = None

    @contextmanager
    def _touching(self, rows: int | Sequence[int], batch_size: int | None, admits: bool) -> Iterator[None]:
        if self._records_past or self._recording is not None:
            raise ValueError(
                f"rows={rows}: rollback and raas_cache.record need all rows in every forward. Call "
                "cache.deactivate_past_recording() first, and leave the record block."
            )
        paged = self._paged_layers
        touched = TouchedRows.of(rows, batch_size, admits, paged)
        if self._knows_layers:
            touched.check_layers(self.layers)
        if admits and paged:
            self.release_rows(touched.indices)
        self._rows, before = touched, self._rows
        self._past_mask = PastMask()  # a mask is now one of these rows only
        try:
            for layer in paged:
                touched.prepare(layer.engine, layer.table.device)
            yield
        finally:
            self._rows, self._past_mask = before, PastMask()
            for layer in self._paged_layers:
                layer.engine.set_rows(None)
                layer.engine.admits = False
                if before is not None:
                    before.prepare(layer.engine, layer.table.device)

    def preallocate(self) -> None:
        """Allocate the whole budget with the next forward, instead of pages as they come.

        A step that is compiled, or captured in a CUDA graph, needs buffers that stay in place. `generate` asks for it
        by itself where it compiles; call this before the first forward if you compile the model yourself.
        """
        self._preallocates = True

    def _add(self, layer: "AnyLayer") -> None:
        if self._records_past and hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()
        self.layers.append(layer)

    def _learn_layers(self, layer_idx: int, module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor) -> bool:
        """The first attention call tells the model's config: give every layer the cache it is to have.

        Returns:
            Whether the layer that called stays at `layer_idx`.
        """
        present, config = list(self.layers), getattr(module, "config", None)
        if not isinstance(config, PreTrainedConfig):
            self.layers = present
            return True
        planned = plan_layers(config, self._settings_of)
        for layer in planned:
            if self._records_past and hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        self.layers = learn_layers(planned, present, layer_idx, key, value)
        warn_if_nothing_is_paged(self.layers, config.model_type, self.budget)
        if self._rows is not None:
            self._rows.check_layers(self.layers)
        return self.layers[layer_idx] is present[layer_idx]

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Fetch a layer's K and V ahead of its turn, but not before they have got to the CPU."""
        # transformers queues that copy on the stream that computes; its prefetch stream would not wait for it.
        self.prefetch_stream.wait_stream(torch.cuda.current_stream())
        super().prefetch(layer_idx, only_non_sliding)

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Move a layer's K and V to the CPU; a paged layer's only when the next one comes: attention reads it first."""
        due: int | None = layer_idx
        if isinstance(self.layers[layer_idx], PagedLayer):
            due, self._not_offloaded = self._not_offloaded, layer_idx
        if due is not None and due != self._not_offloaded:
            super().offload(due, only_non_sliding)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(length, offset) of a layer's mask; the offset tells the mask function of this cache.

        Raises:
            ValueError: the model is about to leave the cache out, for it trains with gradient checkpointing.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            check_checkpointing(calling_module(PreTrainedModel))
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        if layer_idx < len(self.layers) and not isinstance(self.layers[layer_idx], PagedLayer):
            return length, offset
        return length, tagged(offset, self)

    def apply_mask(self, mask: torch.Tensor | None, seen: int, new: int) -> None:
        """Show and hide the tokens held as a 2-d attention mask says. The registered mask functions call this.

        Args:
            mask (`torch.Tensor`, *optional*): `[batch, tokens]` bool, False for a hidden token; None changes nothing.
            seen (`int`): tokens before this forward.
            new (`int`): tokens of this forward.

        Raises:
            RuntimeError: the last forward did not end.
            ValueError: the mask has fewer tokens than the sequence.
        """
        if self._is_torn:
            raise RuntimeError(INTERRUPTED)
        layers = self._paged_layers
        if layers:
            self._past_mask.apply(mask, seen, new, layers)
        else:
            self._past_mask.learn(mask, new)

    @property_of_an_instance
    def is_compileable(self) -> bool:
        """Whether a decode step can be compiled, or captured in a CUDA graph, once and for all.

        Not with a method that evicts nothing (its store grows), with offloading, while anything is recorded; not for
        models that transformers cannot compile, and those with layers whose cache is not static (sliding windows); not
        where `generate` compiles nothing: on a CPU, or with `disable_compile=True`. The model is the one that asks
        first, as its `generate` does before the cache has seen anything of it.

        Raises:
            ValueError: `generate` asks, and the step that it prepares cannot use the cache (see `check_generate_step`).
        """
        if not torch.compiler.is_compiling():
            check_generate_step(self)
        is_noted = self._records_past or self._recording is not None
        if self.offloading or is_noted or self._reads_prefill or not self.settings.policy.evicts:
            return False
        if not torch.compiler.is_compiling() and (self._suits_model is None or is_asked_by_generate()):
            model = calling_module(PreTrainedModel)
            if model is not None:
                layers = self.layers if self._knows_layers else plan_layers(model.config, self._settings_of)
                compiles = generate_compiles(model.device)
                suits = can_compile(model, DISPATCHED) and all(layer.is_compileable for layer in layers)
                self._suits_model = suits and compiles is not False
                self._preallocates |= bool(suits and compiles)
        return self._suits_model is not False and all(layer.is_compileable for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the K and V buffers over all layers, allocated, not used; scales of 8-bit codes counted in."""
        return inspection.nbytes(self.layers)

    def resident_positions(self, layer_idx: int) -> torch.Tensor:
        """Sequence index held in each slot: int64 `[batch, kv_heads, slots]`, -1 where empty or padding."""
        kv = inspection.paged_layer(self.layers, layer_idx).engine.kv
        return kv.positions.long().masked_fill(kv.bias != 0, -1)

    def resident_tokens(self, layer_idx: int) -> torch.Tensor:
        """Tokens held, padding not counted: int64 `[batch, kv_heads]`."""
        return (inspection.paged_layer(self.layers, layer_idx).engine.kv.bias == 0).sum(-1)

    def evicted_pages(self, layer_idx: int) -> torch.Tensor:
        """Pages evicted so far: int64 `[batch, kv_heads]`."""
        table = inspection.paged_layer(self.layers, layer_idx).table
        return torch.from_numpy(table.evicted)[:, None].expand(-1, table.num_heads).to(table.device)

    @property
    def seen_tokens(self) -> torch.Tensor:
        """Tokens that each row has seen, evicted tokens and padding counted in: int64 `[batch]`.

        `seen_tokens[:, None]` are the `position_ids` of the next token where rows began at different steps.
        """
        return inspection.seen_tokens(self._paged_layers)

    @property
    def evictions(self) -> int:
        """Pages that the row with the most evictions has evicted so far, over all layers and KV heads."""
        return sum(int(layer.table.evicted.max()) * layer.table.num_heads for layer in self._paged_layers)

    @property
    def is_over_budget(self) -> bool:
        """Whether the prompt leaves a layer less room than `min_decode_pages`, so that more is held than budgeted."""
        return any(layer.table.is_over_budget for layer in self._paged_layers)

    @property
    def _paged_layers(self) -> list[PagedLayer]:
        """The layers that hold pages."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer) and layer.table.kv is not None]

    def observe(self, recording: "Recording | None") -> None:
        """From now on tell `recording` what every page scores, or nobody; see `raas_cache.record`.

        Raises:
            ValueError: the cache is being recorded already.
        """
        if recording is not None and self._recording is not None:
            raise ValueError("cache is already recorded by another raas_cache.record: leave that with block first.")
        self._recording = recording
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer.trace = None  # `update` gives each layer its own

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a layer has seen, evicted ones included.

        Raises:
            ValueError: a model whose RoPE changes at this length is about to drop the cache (see `length_to_tell`).
        """
        seen = super().get_seq_length(layer_idx)
        if torch.compiler.is_compiling():
            return seen
        caller = inspect.currentframe().f_back  # type: ignore[union-attr]  # CPython has both
        return length_to_tell(seen, caller)  # type: ignore[arg-type]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache never ends a generation."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """See `Cache.has_previous_state`; a ValueError if the cache was not told of linear-attention layers."""
        if not self._knows_layers:
            raise ValueError(NEEDS_CONFIG)
        return super().has_previous_state(layer_idx, state_idx)

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Refused: an indexer (DeepSeek Sparse Attention) picks tokens by their place in the sequence."""
        raise ValueError(
            f"Layer {layer_idx} of this model selects tokens with an indexer over the whole sequence, which a budget "
            "cannot bound: use a DynamicCache for this model."
        )

    def reset(self) -> None:
        """Forget all tokens and what the model is, and stop recording the past.

        The next prompt may be of another size and batch, and of another model, if the cache was made without `config`.
        """
        super().reset()
        self._forget()
        if self._config is None:
            # Layers that are not paged were chosen for the model: the next attention call tells anew.
            is_paged = all(isinstance(layer, PagedLayer) for layer in self.layers)
            self.layers = LayersToCome(self.layers if is_paged else [])
            return
        # The windows of transformers 5.17 keep their length through a reset: take new ones.
        for index, layer in enumerate(plan_layers(self._config, self._settings_of)):
            if getattr(layer, "is_sliding", False):
                self.layers[index] = layer

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """What is done to one layer after the other leaves the cache unusable if it stops in between."""
        if self._is_torn:
            raise RuntimeError(INTERRUPTED)
        self._is_torn = True
        yield
        self._is_torn = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`, for beam search."""
        with self._all_or_none():
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        with self._all_or_none():
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`."""
        with self._all_or_none():
            super().batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        """From now on, note what each forward overwrites, so that `crop` can take its tokens back.

        `generate` calls this for assisted decoding and prompt look-up. The next forward is input even if it is of
        several tokens; after that, several tokens in one forward are a draft of generated ones.

        Raises:
            ValueError: with `prompt="evict"`, where input goes for good; or inside `on_rows` or `admit`.
        """
        if self._rows is not None:
            raise ValueError(
                f"rows={self._rows.indices}: forwards that touch some rows only cannot be taken back. Leave out "
                "assistant_model / prompt_lookup_num_tokens inside cache.on_rows and cache.admit."
            )
        super().activate_past_recording()
        self._records_past = True

    def deactivate_past_recording(self) -> None:
        """End what `activate_past_recording` began, which `generate` never does: several tokens are input again."""
        self._records_past = False
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens: the cache is then as if it had never seen them.

        Args:
            tokens_to_remove (`int`): 0 or negative, as transformers counts them. 0 only ends what can be taken back.

        Raises:
            ValueError: `tokens_to_remove` is positive.
            RuntimeError: the past of these tokens was not recorded (`activate_past_recording`), or a layer holds a
                recurrent state, which cannot go back. Nothing is changed then.
        """
        if self._is_torn:
            raise RuntimeError(INTERRUPTED)
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding counts in tensors
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PagedLayer):
                layer.check_crop(tokens_to_remove)
            if tokens_to_remove and not layer.is_croppable:
                raise RuntimeError(
                    f"tokens_to_remove={tokens_to_remove}: layer {index} ({type(layer).__name__}) has one state for "
                    "the whole past and cannot take tokens back. Do not pass assistant_model or "
                    "prompt_lookup_num_tokens for this model."
                )
        # The others first: a window that was not recorded raises, and nothing has changed then.
        for layer in self.layers:
            if not isinstance(layer, PagedLayer):
                layer.crop(tokens_to_remove)  # type: ignore[union-attr]  # transformers calls it so, too
        with self._all_or_none():
            for layer in self.layers:
                if isinstance(layer, PagedLayer):
                    layer.crop(tokens_to_remove)

    def __repr__(self) -> str:
        policy = f"{self.settings.policy}, " if type(self) is PagedCache else ""
        held = inspection.summary(self._paged_layers)
        return f"{type(self).__name__}({policy}budget={self.budget}, {held}, {self.nbytes} bytes)"

    def _repr_html_(self) -> str:
        """What Jupyter shows."""
        from ..viz.html import of_cache  # only when a notebook shows the cache

        settings, name = self.settings, type(self).__name__
        about = f"{settings.policy}, budget={self.budget}, page_size={settings.page_size}, prompt={settings.prompt!r}"
        return of_cache(name, f"{about}, {self.nbytes:,} bytes", self.layers, self.is_over_budget)
