"""`PagedCache`: the `Cache` API of transformers over paged layers, and nothing else.

The order is: settings, `update`, rows, the layers of a model, offloading, masks, compilation, questions about a cache,
and the rest of the API (reset, rows, crop). transformers decides the names and arguments of the `Cache` API. Check a
new option in `settings.py`, and implement it in the layer or in the engine.
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
    """A KV cache in pages. When the budget is full, its policy decides which page is evicted.

    For every policy that evicts, time and memory of a step are O(budget), however many tokens have been seen. As long
    as nothing is evicted, the output equals the output with `DynamicCache`.

    Args:
        budget (`int`, or a list of ints): number of tokens to hold for each row, layer and KV head, including the
            prompt; at least one page. For a method that never evicts: number of tokens to read. A list has one number
            per layer of the model (see `learn_budgets`); the numbers of layers without full attention are not used.
        policy (`Policy`): the method, for example `H2OPolicy()`. `RaaSCache`, `QuestCache` and the other classes have
            their own policy.
        page_size (`int`): tokens per page, a power of two.
        scoring (`str`): with `"exact"`, the score of a page comes from the softmax weights of its tokens; with
            `"minmax"`, from a softmax over upper bounds of the logits of each page, which key_min and key_max give.
        granularity (`str`, *optional*): `"head"` evicts pages for each KV head separately, `"layer"` evicts the same
            pages in all heads of a row. The default is that of the method's paper.
        min_decode_pages (`int`): number of decode pages that a row has even if the prompt leaves room for fewer. There
            is a warning in this case.
        prompt (`str`, *optional*): the prompt mode. The default is that of the method's paper.

            - `"pin"`: prefill tokens are never evicted, and always read.
            - `"select"`: prefill tokens are never evicted. A decode step reads the prefill pages with the highest logit
              bounds, at most half of the budget. O(budget) time and O(prompt + budget) memory for any prompt.
            - `"evict"`: after each prefill, its pages are evicted like all other pages, except the first page of the
              row (the sink). O(budget) memory for any prompt. Assisted decoding is not possible.
        kv_dtype (`str`, *optional*): store keys and values as `"int8"` or `"fp8"` codes, with one scale per token and
            KV head, or as `"int4"` codes: each channel of a page's keys between its smallest and its largest key, each
            value between its smallest and its largest number. The default is the model's dtype.
        config (`PreTrainedConfig`, *optional*): config of the model. It says which layers have full attention and are
            paged. The other layers (sliding windows, linear attention, layers that share the KV of another layer) keep
            the cache that transformers gives them. Without `config`, the first attention call provides it. A model that
            starts with linear attention needs it; otherwise an error asks for it.
        offloading (`bool`): keep the keys and values of a layer in CPU memory while other layers run. Needs a CUDA GPU.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, the method does not support it, or
            `config` has a layer type that this cache does not support.
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
        kv_dtype: Literal["int8", "fp8", "int4"] | None = None,
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
        """Forget everything about the model and its sequence."""
        self._records_past = False
        self._handed_out: LayerEngine | None = None  # the engine of the last `update`
        self._last_idx, self._tokens_before = -1, 0  # its layer, and its tokens before the forward
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
        """Receive the new tokens of a layer. Its attention call stores them (see `PagedLayer.update`).

        Args:
            key_states, value_states: `[rows, kv_heads, new, head_dim]`; RoPE applied to the keys.
            layer_idx: index of the layer in the model.

        Returns:
            Key and value to pass to the attention function.

        Raises:
            RuntimeError: no attention function read the result of the last update, or the last forward was interrupted.
            ValueError: batch size, dtypes or device differ from the stored tokens, or the model would misuse or
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
            # After an exception, only some of the layers have the tokens of the last forward.
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
        """Tell a layer the state of the cache: prefilling, preallocation, recording, and the rows of the forward."""
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
        """Refuse to continue if no attention function read the last update, or only some layers changed their rows."""
        if self._is_torn:
            raise RuntimeError(INTERRUPTED)
        last = self._handed_out
        if last is None or last.pending is None or not last.pending.awaits_attention:
            return
        config = getattr(calling_module(torch.nn.Module), "config", None)
        # Usually the next layer of the same forward detects this. If the same layer comes again, a new forward has
        # begun: the last forward was interrupted, unless the model has only one layer.
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
        """Inside this context, every token is prefill, also in forwards of one token.

        A cache receives tokens without their roles. Without this context, the first forward is prefill, later forwards
        of several tokens are prefill (a user's turn, a chunk of the prompt), and later forwards of one token are decode
        steps, whose tokens may be evicted. A prompt that is fed token by token needs this context. With
        `prompt="evict"` it changes nothing, because prefill and decode tokens are evicted by the same rule. Steps
        inside the context are not compiled.

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
        """Inside this context, forwards only touch the rows `rows` of the cache. Their batch has one row for each.

        Pass `position_ids=cache.seen_tokens[rows, None]` (`rows` as a list) to the model, because each row has its own
        position.

        Args:
            rows: a row index or several, in the order of the forward's batch.

        Raises:
            TypeError, ValueError: `rows` are not rows of the cache; a layer of the model is not paged; or the cache is
                recorded, or notes what its forwards overwrite.
        """
        with self._touching(rows, None, admits=False):
            yield

    @contextmanager
    def admit(self, rows: int | Sequence[int], batch_size: int | None = None) -> Iterator[None]:
        """Inside this context, the first forward is the prompt of the rows `rows`. Their earlier tokens are dropped.

        The other rows do not change, so a sequence can start while other sequences are decoded.

        Args:
            rows: a row index or several, in the order of the forward's batch.
            batch_size: number of rows of an empty cache; by default the largest index in `rows` plus one.

        Raises:
            TypeError, ValueError: as `on_rows`; or `batch_size` is not the number of rows of the cache.

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
        """Forget the tokens of the rows `rows`. `admit` can start other sequences there.

        Raises:
            TypeError, ValueError: `rows` are not rows of the cache.
        """
        layers = self._paged_layers
        if not layers:
            raise ValueError(f"rows={rows}: the cache is empty, so there is no row to release.")
        indices = checked_rows(rows, layers[0].table.batch_size)
        with self._all_or_none():
            for layer in layers:
                layer.table.release_rows(Rows.from_list(indices, layer.table.device))
                layer.engine.known_mask = None

    @contextmanager
    def _touching(self, rows: int | Sequence[int], batch_size: int | None, admits: bool) -> Iterator[None]:
        if self._records_past or self._recording is not None:
            raise ValueError(
                f"rows={rows}: rollback and raas_cache.record need all rows in every forward. Call "
                "cache.deactivate_past_recording() first, and leave the record block."
            )
        paged = self._paged_layers
        touched = TouchedRows.checked(rows, batch_size, admits, paged)
        if self._knows_layers:
            touched.check_layers(self.layers)
        if admits and paged:
            self.release_rows(touched.indices)
        self._rows, before = touched, self._rows
        self._past_mask = PastMask()  # the next masks cover these rows only
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
        """Allocate the whole budget in the next forward, instead of pages when they are needed.

        A step that is compiled, or captured in a CUDA graph, needs buffers that keep their addresses. If `generate`
        compiles the step, it does this itself. Call it before the first forward if you compile the model yourself.
        """
        self._preallocates = True

    def _add(self, layer: "AnyLayer") -> None:
        if self._records_past and hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()
        self.layers.append(layer)

    def _learn_layers(self, layer_idx: int, module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Choose the layers of the cache by the model's config, which the first attention call provides.

        Args:
            layer_idx: the layer whose attention was called.
            module: its attention module.
            key, value: its new tokens, `[batch, kv_heads, new, head_dim]`.

        Returns:
            Whether the layer at `layer_idx` is still the same.
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
        """Copy the keys and values of a layer to the GPU ahead of time, but after their copy to the CPU has ended."""
        # transformers 5.17 to 5.24 copies to the CPU on the compute stream, and its prefetch stream does not wait.
        self.prefetch_stream.wait_stream(torch.cuda.current_stream())
        super().prefetch(layer_idx, only_non_sliding)

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Move the keys and values of a layer to the CPU; of a paged layer at the next layer, after its attention."""
        due: int | None = layer_idx
        if isinstance(self.layers[layer_idx], PagedLayer):
            due, self._not_offloaded = self._not_offloaded, layer_idx
        if due is not None and due != self._not_offloaded:
            super().offload(due, only_non_sliding)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(length, offset) of the mask of a layer. The offset has this cache as attribute `paged_cache`.

        Raises:
            ValueError: the model trains with gradient checkpointing, and would ignore the cache.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            check_checkpointing(calling_module(PreTrainedModel))
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        if layer_idx < len(self.layers) and not isinstance(self.layers[layer_idx], PagedLayer):
            return length, offset
        return length, tagged(offset, self)

    def apply_mask(self, mask: torch.Tensor | None, seen: int, new: int) -> None:
        """Show and hide tokens in the cache as a 2-d attention mask says. The registered mask functions call this.

        Args:
            mask (`torch.Tensor`, *optional*): `[rows, tokens]` bool, False for a hidden token; None changes nothing.
            seen (`int`): number of tokens before this forward.
            new (`int`): number of tokens of this forward.

        Raises:
            RuntimeError: the last forward was interrupted.
            ValueError: the mask has fewer tokens than the sequence, or shows left padding.
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
        """Whether one compiled decode step, or one CUDA graph, can serve all decode steps.

        It is False for a method that never evicts (its memory grows), with offloading, and while the cache is recorded
        or notes what its forwards overwrite. It is False for a model that transformers cannot compile, and for a model
        with layers whose cache is not static (sliding windows). It is also False if `generate` does not compile: on a
        CPU, or with `disable_compile=True`. The model is found on the stack when this property is first read, which
        `generate` does before the first forward.

        Raises:
            ValueError: `generate` prepares a step that cannot use the cache (see `check_generate_step`).
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
        """Bytes that the buffers of keys and values of all layers occupy, with the scales or bounds of codes."""
        return inspection.nbytes(self.layers)

    def resident_positions(self, layer_idx: int) -> torch.Tensor:
        """Position of the token in each slot: int64 `[batch, kv_heads, slots]`, -1 if it is empty or hidden."""
        kv = inspection.paged_layer(self.layers, layer_idx).engine.kv
        return kv.positions.long().masked_fill(kv.bias != 0, -1)

    def resident_tokens(self, layer_idx: int) -> torch.Tensor:
        """Number of tokens held, without hidden tokens: int64 `[batch, kv_heads]`."""
        return (inspection.paged_layer(self.layers, layer_idx).engine.kv.bias == 0).sum(-1)

    def evicted_pages(self, layer_idx: int) -> torch.Tensor:
        """Number of pages evicted so far: int64 `[batch, kv_heads]`."""
        table = inspection.paged_layer(self.layers, layer_idx).table
        return torch.from_numpy(table.evicted)[:, None].expand(-1, table.num_heads).to(table.device)

    @property
    def seen_tokens(self) -> torch.Tensor:
        """Number of tokens that each row has seen, with evicted tokens and left padding: int64 `[batch]`.

        `seen_tokens[:, None]` are the `position_ids` of the next token if rows started at different steps, without
        padding.
        """
        return inspection.seen_tokens(self._paged_layers)

    @property
    def evictions(self) -> int:
        """Number of pages evicted so far, over all layers and KV heads, in the row that has evicted the most."""
        return sum(int(layer.table.evicted.max()) * layer.table.num_heads for layer in self._paged_layers)

    @property
    def is_over_budget(self) -> bool:
        """Whether the prompt leaves a layer fewer than `min_decode_pages` pages: the cache then exceeds the budget."""
        return any(layer.table.is_over_budget for layer in self._paged_layers)

    @property
    def _paged_layers(self) -> list[PagedLayer]:
        """The paged layers that have buffers."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer) and layer.table.kv is not None]

    def observe(self, recording: "Recording | None") -> None:
        """Send scores and priorities of all pages to `recording`; None ends this. See `raas_cache.record`.

        Raises:
            ValueError: the cache is already recorded.
        """
        if recording is not None and self._recording is not None:
            raise ValueError("cache is already recorded by another raas_cache.record: leave that with block first.")
        self._recording = recording
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer.trace = None  # `update` gives each layer its own

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens that a layer has seen, with evicted tokens.

        Raises:
            ValueError: the model would drop the cache, because its RoPE changes at this length (see `length_to_tell`).
        """
        seen = super().get_seq_length(layer_idx)
        if torch.compiler.is_compiling():
            return seen
        caller = inspect.currentframe().f_back  # type: ignore[union-attr]  # CPython has both
        return length_to_tell(seen, caller)  # type: ignore[arg-type]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, because the length of the sequence has no limit."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """See `Cache.has_previous_state`. Raises a ValueError if the cache does not know the model's config."""
        if not self._knows_layers:
            raise ValueError(NEEDS_CONFIG)
        return super().has_previous_state(layer_idx, state_idx)

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Raise a ValueError: an indexer (DeepSeek Sparse Attention) selects tokens from the whole sequence."""
        raise ValueError(
            f"Layer {layer_idx} of this model selects tokens with an indexer over the whole sequence, which a budget "
            "cannot bound: use a DynamicCache for this model."
        )

    def reset(self) -> None:
        """Forget all tokens and the model, and drop all rollback notes.

        The next prompt may have another length and batch size. If the cache was created without `config`, it may also
        be for another model.
        """
        super().reset()
        self._forget()
        if self._config is None:
            # Layers that are not paged were chosen for this model. The next attention call chooses again.
            is_paged = all(isinstance(layer, PagedLayer) for layer in self.layers)
            self.layers = LayersToCome(self.layers if is_paged else [])
            return
        # In transformers 5.17, `reset` does not reset the length of a sliding window, so create new ones. This can go
        # when the package needs a later release.
        for index, layer in enumerate(plan_layers(self._config, self._settings_of)):
            if getattr(layer, "is_sliding", False):
                self.layers[index] = layer

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Mark the cache as unusable if an exception stops the block, because only some layers may have changed."""
        if self._is_torn:
            raise RuntimeError(INTERRUPTED)
        self._is_torn = True
        yield
        self._is_torn = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row i a copy of row `beam_idx[i]`, for beam search."""
        with self._all_or_none():
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the copies are adjacent."""
        with self._all_or_none():
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`."""
        with self._all_or_none():
            super().batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        """Note from now on what each forward overwrites, so that `crop` can take its tokens back.

        `generate` calls this for assisted decoding and prompt look-up. If the next forward has several tokens, they are
        prefill. After it, several tokens in one forward are a draft.

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
        """End `activate_past_recording`: several tokens are prefill again. `generate` never calls this."""
        self._records_past = False
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens: the cache is then as if it had never seen them.

        Args:
            tokens_to_remove (`int`): 0 or negative, as in transformers. 0 only drops the notes.

        Raises:
            ValueError: `tokens_to_remove` is positive.
            RuntimeError: there are no notes for these tokens (see `activate_past_recording`), or a layer has one state
                for the whole past (linear attention). Nothing has changed then.
        """
        if self._is_torn:
            raise RuntimeError(INTERRUPTED)
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding passes a tensor
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PagedLayer):
                layer.check_crop(tokens_to_remove)
            if tokens_to_remove and not layer.is_croppable:
                raise RuntimeError(
                    f"tokens_to_remove={tokens_to_remove}: layer {index} ({type(layer).__name__}) has one state for "
                    "the whole past and cannot take tokens back. Do not pass assistant_model or "
                    "prompt_lookup_num_tokens for this model."
                )
        # First the layers of transformers: a window without a record raises an error before a paged layer changes.
        for layer in self.layers:
            if not isinstance(layer, PagedLayer):
                layer.crop(tokens_to_remove)  # type: ignore[union-attr]  # as transformers calls it
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
