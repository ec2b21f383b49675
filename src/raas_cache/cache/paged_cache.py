"""`PagedCache`: the `Cache` API of transformers over paged layers. transformers decides its names and arguments."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ..engine.forward import ForwardGuard
from ..engine.layer_settings import LayerSettings
from ..engine.policy import Policy
from . import inspection, model_probe
from .compiled_step import CompiledStep
from .head_groups import new_layer
from .layer_types import LayerPlan, LayersToCome, crop_layers
from .modes import Modes
from .paged_layer import PagedLayer, holding_pages
from .past_mask import tagged
from .rows import release_rows
from .settings import Budget, Shares, checked_settings, property_of_an_instance


if TYPE_CHECKING:
    from ..tracing.recording import Recording
    from .paged_layer import AnyLayer


class PagedCache(Cache):
    """A KV cache in pages. When the budget is full, its policy decides which page is evicted.

    For every policy that evicts, time and memory of a step are O(budget), however many tokens have been seen. As long
    as nothing is evicted, the output equals the output with `DynamicCache`.

    Args:
        budget (`int`, or a list of ints): number of tokens to hold for each row, layer and KV head, including the
            prompt; at least one page. For a method that never evicts: number of tokens to read. A list has one number
            per layer of the model; the numbers of layers without full attention are not used.
        policy (`Policy`): the method, for example `H2OPolicy()`. `RaaSCache` and the other classes set it themselves.
        page_size (`int`): tokens per page, a power of two.
        scoring (`str`): with `"exact"`, the score of a page comes from the softmax weights of its tokens; with
            `"minmax"`, from a softmax over upper bounds of the logits of each page, which key_min and key_max give.
        granularity (`str`, *optional*): `"head"` evicts pages for each KV head separately, `"layer"` the same pages in
            all heads of a row. The default is that of the method's paper.
        min_decode_pages (`int`): decode pages that a row has even if the prompt leaves room for fewer, with a warning.
        prompt (`str`, *optional*): the prompt mode. The default is that of the method's paper.

            - `"pin"`: prefill tokens are never evicted, and always read.
            - `"select"`: prefill tokens are never evicted. A decode step reads the prefill pages with the highest logit
              bounds, at most half of the budget. O(budget) time and O(prompt + budget) memory for any prompt.
            - `"evict"`: after each prefill, its pages are evicted like all other pages, except the first page of the
              row (the sink). O(budget) memory for any prompt. Assisted decoding is not possible.
        kv_dtype (`str`, *optional*): codes of keys and values instead of the model's dtype: `"int8"` or `"fp8"`, with a
            scale per token and KV head; `"int4"`, with ranges per channel of a page's keys and per token's value.
        config (`PreTrainedConfig`, *optional*): config of the model. Layers of full attention are paged; the others
            (sliding windows, linear attention, shared KV) keep the cache of transformers. The first attention call
            provides it, except for a model that starts with linear attention.
        offloading (`bool`): keep the keys and values of a layer in CPU memory while other layers run. Needs a CUDA GPU.
        shares (`list` or path, *optional*): for each layer, the factor on its decode pages: one number, or a list with
            one number per KV head. `learn_shares` finds them; a path names a JSON file of `raas-cache shares`.

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
        shares: Shares | None = None,
    ):
        self.budget, self.settings = checked_settings(
            budget, policy, page_size, scoring, granularity, min_decode_pages, prompt, kv_dtype
        )
        self._modes = Modes()
        self._plan = LayerPlan(self.settings, self.budget, shares, config, offloading, self._modes)
        super().__init__(layers=self._plan.first(), offloading=offloading)
        self._forget()

    def _forget(self) -> None:
        """Forget everything about the model and its sequence."""
        self._modes.forget()
        self._guard, self._compiled_step = ForwardGuard(), CompiledStep()
        self._warned = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Receive the new tokens of a layer, and return key and value for its attention call, which stores them.

        Args:
            key_states, value_states: `[rows, kv_heads, new, head_dim]`; RoPE applied to the keys.
            layer_idx: index of the layer in the model.

        Raises:
            RuntimeError: no attention function read the result of the last update, or the last forward was interrupted.
            ValueError: batch size, dtypes or device differ from the stored tokens, or the model would misuse the cache.
        """
        guard, modes, layers = self._guard, self._modes, self.layers
        if guard.is_unread():
            model_probe.refuse_unread(self, layer_idx <= guard.layer_idx)
        new = key_states.shape[2]
        if layer_idx == 0 and (new > 1 or not layers or not layers[0].is_initialized):  # type: ignore[union-attr]
            model_probe.check_caller(self, new)
        while len(layers) <= layer_idx:
            layers.append(new_layer(self._plan.settings_of(len(layers))))
            modes.tell_new(layers[-1:])
        layer = layers[layer_idx]
        if not isinstance(layer, PagedLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        guard.begins(layer.engine, layer_idx)
        if modes.reads_prefill or modes.preallocates or modes.recording is not None or modes.rows is not None:
            modes.tell(layer, layer_idx, key_states.device)
        if self.offloading:
            layer.prefetch()
            keys, values = super().update(key_states, value_states, layer_idx)
            forward = layer.engine.pending
        else:
            forward, keys, values = layer.decode.begin(key_states, value_states)
        if forward is not layer.decode:
            self._warned = layer.on_prefill(forward, layer_idx, self._warned)  # type: ignore[arg-type]  # it began
            if isinstance(layers, LayersToCome):
                layer.engine.on_module = partial(self._plan.learn, self, layer_idx)
        return keys, values

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        """Inside this context, every token is prefill, also in forwards of one token.

        Without this context, the first forward and all forwards of several tokens (a user's turn, a chunk of the
        prompt) are prefill. Later forwards of one token are decode steps, whose tokens may be evicted. A prompt that is
        fed token by token needs this context. With `prompt="evict"` it changes nothing, because prefill and decode
        tokens are evicted by the same rule. Steps inside the context are not compiled.

        Example:

        ```python
        >>> with cache.prefilling():
        ...     for token in prompt_ids.split(1, dim=1):
        ...         logits = model(token, past_key_values=cache).logits
        ```
        """
        with self._modes.prefilling(self.settings.prompt != "evict", self):
            yield

    @contextmanager
    def on_rows(self, rows: int | Sequence[int]) -> Iterator[None]:
        """Inside this context, forwards only touch the rows `rows` of the cache. Their batch has one row for each.

        Pass `position_ids=cache.seen_tokens[rows, None]` (`rows` as a list), because each row has its own position.

        Args:
            rows: a row index or several, in the order of the forward's batch.

        Raises:
            TypeError, ValueError: `rows` are not rows of the cache; a layer of the model is not paged; or the cache is
                recorded, or notes what its forwards overwrite.
        """
        with self._modes.touching(rows, None, self.layers, self._guard, admits=False):
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
        >>> with cache.admit(1):  # at any later step
        ...     model(second_prompt, past_key_values=cache)
        >>> model(tokens, position_ids=cache.seen_tokens[:, None], past_key_values=cache)
        ```
        """
        with self._modes.touching(rows, batch_size, self.layers, self._guard, admits=True):
            yield

    def release_rows(self, rows: int | Sequence[int]) -> None:
        """Forget the tokens of the rows `rows`. They are free then: `admit` can start other sequences there.

        Raises:
            TypeError, ValueError: `rows` are not rows of the cache.
        """
        release_rows(rows, holding_pages(self.layers), self._guard)

    def preallocate(self) -> None:
        """Allocate the whole budget in the next forward, instead of pages when they are needed.

        A compiled step or a CUDA graph needs it. `generate` does it itself; call it if you compile the model yourself.
        """
        self._modes.preallocates = True

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Copy the keys and values of a layer to the GPU ahead of time, but after their copy to the CPU has ended."""
        # transformers 5.17 to 5.24 copies to the CPU on the compute stream, and its prefetch stream does not wait.
        self.prefetch_stream.wait_stream(torch.cuda.current_stream())
        super().prefetch(layer_idx, only_non_sliding)

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Move the keys and values of a layer to the CPU; of a paged layer at the next layer, after its attention."""
        for due in self._modes.due_to_offload(layer_idx, self.layers[layer_idx]):
            super().offload(due, only_non_sliding)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(length, offset) of the mask of a layer. The offset has this cache as attribute `paged_cache`.

        Raises:
            ValueError: the model trains with gradient checkpointing, and would ignore the cache.
        """
        model_probe.check_checkpointing()
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        if layer_idx < len(self.layers) and not isinstance(self.layers[layer_idx], PagedLayer):
            return length, offset
        return length, tagged(offset, self)

    def apply_mask(self, mask: torch.Tensor | None, seen: int, new: int) -> None:
        """Show and hide tokens in the cache as a 2-d attention mask says. The registered mask functions call this.

        Args:
            mask: `[rows, tokens]` bool, False for a hidden token; None changes nothing.
            seen, new: number of tokens before this forward, and of this forward.

        Raises:
            RuntimeError, ValueError: the last forward was interrupted; or the mask is too short, or shows left padding.
        """
        self._guard.check()
        self._modes.past_mask.apply(mask, seen, new, holding_pages(self.layers))

    @property_of_an_instance
    def is_compileable(self) -> bool:
        """Whether one compiled decode step, or one CUDA graph, can serve all decode steps.

        It is False for a method that never evicts, with offloading, and while the cache is recorded or can roll back,
        and for a model that transformers or `generate` does not compile (sliding windows, CPU, `disable_compile=True`).

        Raises:
            ValueError: `generate` prepares a step that cannot use the cache (see `check_generate_step`).
        """
        if not torch.compiler.is_compiling():
            model_probe.check_generate_step(self)
        if self.offloading or not self.settings.policy.evicts:
            return False
        return self._compiled_step.is_possible(self._modes, self.layers, self._plan)

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers of keys and values of all layers occupy, with the scales or bounds of codes."""
        return inspection.nbytes(self.layers)

    def resident_positions(self, layer_idx: int) -> torch.Tensor:
        """Position of the token in each slot: int64 `[batch, kv_heads, slots]`, -1 if it is empty or hidden."""
        return inspection.resident_positions(self.layers, layer_idx)

    def resident_tokens(self, layer_idx: int) -> torch.Tensor:
        """Number of tokens held, without hidden tokens: int64 `[batch, kv_heads]`."""
        return inspection.resident_tokens(self.layers, layer_idx)

    def evicted_pages(self, layer_idx: int) -> torch.Tensor:
        """Number of pages evicted so far: int64 `[batch, kv_heads]`."""
        return inspection.evicted_pages(self.layers, layer_idx)

    @property
    def seen_tokens(self) -> torch.Tensor:
        """Number of tokens that each row has seen, with evicted tokens and left padding: int64 `[batch]`.

        0 for a free row. Of rows without padding that started at different steps, `seen_tokens[:, None]` are the next
        `position_ids`.
        """
        return inspection.seen_tokens(self.layers)

    @property
    def evictions(self) -> int:
        """Number of pages evicted so far, over all layers and KV heads, in the row that has evicted the most."""
        return inspection.evictions(self.layers)

    @property
    def is_over_budget(self) -> bool:
        """Whether the prompt leaves a layer fewer than `min_decode_pages` pages: the cache then exceeds the budget."""
        return inspection.is_over_budget(self.layers)

    def observe(self, recording: "Recording | None") -> None:
        """Send scores and priorities of all pages to `recording`; None ends this. See `raas_cache.record`.

        Raises:
            ValueError: the cache is already recorded, or the KV heads of a recorded layer have different shares.
        """
        if recording is not None:
            self._plan.check_recording(recording.wanted[0])
        self._modes.observe(recording, self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens that a layer has seen, with evicted tokens.

        Raises:
            ValueError: the model would drop the cache, because its RoPE changes at this length (see `length_to_tell`).
        """
        seen = super().get_seq_length(layer_idx)
        is_traced = torch.compiler.is_compiling() or torch.is_tensor(seen)
        return seen if is_traced else model_probe.length_to_tell(seen, sys._getframe(1))

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, because the length of the sequence has no limit."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """See `Cache.has_previous_state`. Raises a ValueError if the cache does not know the model's config."""
        self._plan.check_known(self.layers)
        return super().has_previous_state(layer_idx, state_idx)

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Raise a ValueError: an indexer (DeepSeek Sparse Attention) selects tokens from the whole sequence."""
        raise model_probe.indexer_error(layer_idx)

    def reset(self) -> None:
        """Forget all tokens and the model, and drop all rollback notes.

        The next prompt may have another length and batch size. Without `config`, it may be for another model.
        """
        super().reset()
        self._forget()
        self.layers = self._plan.after_reset(self.layers)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row i a copy of row `beam_idx[i]`, for beam search."""
        with self._guard.all_or_none():
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the copies are adjacent."""
        with self._guard.all_or_none():
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`."""
        with self._guard.all_or_none():
            super().batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        """Note from now on what each forward overwrites, so that `crop` can take its tokens back.

        `generate` calls this for assisted decoding and prompt look-up. If the next forward has several tokens, they are
        prefill. After it, several tokens in one forward are a draft.

        Raises:
            ValueError: with `prompt="evict"`, where input goes for good; or inside `on_rows` or `admit`.
        """
        self._modes.check_past_recording()
        super().activate_past_recording()
        self._modes.records_past = True

    def deactivate_past_recording(self) -> None:
        """End `activate_past_recording`: several tokens are prefill again. `generate` never calls this."""
        self._modes.end_past_recording(self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens: the cache is then as if it had never seen them.

        Args:
            tokens_to_remove (`int`): 0 or negative, as in transformers. 0 only drops the notes.

        Raises:
            ValueError: `tokens_to_remove` is positive.
            RuntimeError: there are no notes for these tokens (see `activate_past_recording`), or a layer has one state
                for the whole past (linear attention). Nothing has changed then.
        """
        crop_layers(self.layers, int(tokens_to_remove), self._guard)  # assisted decoding passes a tensor

    def __repr__(self) -> str:
        policy = self.settings.policy if type(self) is PagedCache else None
        return inspection.text(type(self).__name__, self.budget, policy, self.layers)

    def _repr_html_(self) -> str:
        return inspection.html(type(self).__name__, self.budget, self.settings, self.layers)
