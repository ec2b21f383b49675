"""`RaaSCache`: the transformers `Cache` API over paged layers, nothing else."""

import inspect
import warnings
from functools import partial
from typing import Literal

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .layer import PagedLayer
from .policies import RaaSPolicy


DEFAULT_ALPHA = 1e-4
# Layers that a hybrid model may keep beside the paged ones: none of them grows with the sequence.
KEPT_LAYERS = ("DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer")


class RaaSCache(Cache):
    """A KV cache of bounded size for long chains of thought (RaaS, Hu et al., Findings of ACL 2025, section 3).

    Pages of KV get the present step as timestamp whenever their attention score makes them a milestone; when the
    budget is full the page with the oldest timestamp is evicted; the prompt never is. Time and memory a step are
    O(budget), however many tokens have been seen. As long as nothing is evicted, outputs are `DynamicCache`'s.

    Example:

    ```python
    >>> from raas_cache import RaaSCache
    >>> out = model.generate(**inputs, past_key_values=RaaSCache(budget=1024), max_new_tokens=32_000)
    ```

    Args:
        budget (`int`): tokens to hold for each row, layer and KV head, the prompt counted in; at least one page.
        page_size (`int`): tokens a page, a power of two.
        alpha (`float`): a page with an attention weight of at least `alpha` on one of its tokens is stamped. In (0, 1).
        top_ratio (`float`, *optional*): instead of `alpha`, stamp this share of the held decode pages, the ones with
            the highest scores. In (0, 1].
        scoring (`str`): `"exact"` scores a page by its largest softmax weight; `"minmax"` by the softmax over min/max
            representatives of the pages.
        granularity (`str`): `"head"` evicts for every KV head by itself; `"layer"` for all heads of a row alike.
        min_decode_pages (`int`): decode pages held even where the prompt leaves room for fewer (a warning says so).
        config (`PreTrainedConfig`, *optional*): the model's config; needed by models with other than full-attention
            layers, whose layers then keep the cache that transformers gives them.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or `config` has a layer type that
            this cache cannot hold.
    """

    def __init__(
        self,
        budget: int,
        *,
        page_size: int = 16,
        alpha: float | None = DEFAULT_ALPHA,
        top_ratio: float | None = None,
        scoring: Literal["exact", "minmax"] = "exact",
        granularity: Literal["head", "layer"] = "head",
        min_decode_pages: int = 8,
        config: PreTrainedConfig | None = None,
    ):
        for name, value in (("budget", budget), ("page_size", page_size), ("min_decode_pages", min_decode_pages)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} must be an int, not {type(value).__name__}.")
            if value < 1:
                raise ValueError(f"{name}={value} must be positive.")
        if page_size & (page_size - 1):
            raise ValueError(f"page_size={page_size} must be a power of two: try 16.")
        if budget < page_size:
            raise ValueError(f"budget={budget} is less than one page: make it at least page_size={page_size} tokens.")
        for name, value, options in (
            ("scoring", scoring, ("exact", "minmax")),
            ("granularity", granularity, ("head", "layer")),
        ):
            if value not in options:
                raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, options))}.")
        # The identity tells a default alpha, which top_ratio replaces, from a given one, which contradicts it.
        if top_ratio is not None and alpha is DEFAULT_ALPHA:
            alpha = None
        policy = RaaSPolicy(alpha, top_ratio)
        new_layer = partial(PagedLayer, policy, budget, page_size, min_decode_pages, scoring, granularity)
        if config is None:
            super().__init__(layer_class_to_replicate=new_layer)
        else:
            super().__init__(layers=_hybrid_layers(config, new_layer))
        self.budget = budget
        self._handed_out: PagedLayer | None = None
        self._warned = False

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Store the new tokens of a layer, and hand the layer to the attention function (see `PagedLayer.update`).

        Raises:
            RuntimeError: the attention implementation did not take what the last update handed out.
            ValueError: batch size, dtype or device differ from those of the tokens held.
        """
        if self._handed_out is not None and self._handed_out.awaits_attention:
            raise RuntimeError(
                f"The attention implementation {_calling_implementation()} did not read the paged cache, so its output "
                'would be wrong. Call model.set_attn_implementation("raas") (or "sdpa") and generate again with a new '
                "cache; a model that changes its keys between cache and attention cannot use this cache."
            )
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if isinstance(layer, PagedLayer):
            self._handed_out = layer
            self._warn_if_prompt_fills_budget(layer)
        return keys, values

    def _warn_if_prompt_fills_budget(self, layer: PagedLayer) -> None:
        if self._warned or layer.room_for_decode >= layer.min_decode_pages:
            return
        self._warned = True
        total = (layer.pinned_pages + layer.decode_pages) * layer.page_size
        warnings.warn(
            f"budget={self.budget} leaves {max(layer.room_for_decode, 0)} pages of {layer.page_size} tokens beside the "
            f"{layer.pinned_pages} pages of the prompt; the cache holds {layer.decode_pages} decode pages all the same "
            f"(min_decode_pages={layer.min_decode_pages}), {total} tokens in all.",
            stacklevel=2,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the K and V buffers over all layers, allocated, not used."""
        # Linear-attention layers have neither attribute, layers not yet filled have None.
        buffers = (getattr(layer, name, None) for layer in self.layers for name in ("keys", "values"))
        return sum(buffer.nbytes for buffer in buffers if buffer is not None)

    def resident_positions(self, layer_idx: int) -> torch.Tensor:
        """Sequence index held in each slot: int64 `[batch, kv_heads, slots]`, -1 where empty or padding."""
        layer = self._paged(layer_idx)
        return layer.positions.long().masked_fill(layer.bias != 0, -1)

    def resident_tokens(self, layer_idx: int) -> torch.Tensor:
        """Tokens held, padding not counted: int64 `[batch, kv_heads]`."""
        return (self._paged(layer_idx).bias == 0).sum(-1)

    def evicted_pages(self, layer_idx: int) -> torch.Tensor:
        """Pages evicted so far: int64 `[batch, kv_heads]`."""
        layer = self._paged(layer_idx)
        return torch.full((layer.batch_size, layer.num_heads), layer.evicted, device=layer.device)

    def _paged(self, layer_idx: int) -> PagedLayer:
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(f"layer_idx={layer_idx} is not a layer of this cache, which has {len(self.layers)} now.")
        layer = self.layers[layer_idx]
        if not isinstance(layer, PagedLayer) or not layer.is_initialized:
            raise ValueError(f"layer_idx={layer_idx} is a {type(layer).__name__} that holds no pages (yet).")
        return layer

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache never ends a generation."""
        return -1

    def activate_past_recording(self):
        """Refused: see `crop`."""
        self.crop(-1)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused unless there is nothing to remove: an evicted page cannot come back.

        Raises:
            RuntimeError: `tokens_to_remove` is not 0.
        """
        if tokens_to_remove != 0:
            raise RuntimeError(
                "RaaSCache cannot take tokens back, which assisted decoding and prompt look-up need: leave out "
                "assistant_model / prompt_lookup_num_tokens, or use a DynamicCache."
            )

    def __repr__(self) -> str:
        paged = [layer for layer in self.layers if isinstance(layer, PagedLayer) and layer.is_initialized]
        held, seen = (paged[0].held, paged[0].seen) if paged else (0, 0)
        evicted = sum(layer.evicted * layer.batch_size * layer.num_heads for layer in paged)
        return (
            f"{type(self).__name__}(budget={self.budget}, held={held}, seen={seen}, evicted={evicted} pages, "
            f"{self.nbytes} bytes)"
        )


def _hybrid_layers(config: PreTrainedConfig, new_layer: partial) -> list:
    """The layers transformers would build for `config`, the full-attention ones paged."""
    layers = DynamicCache(config=config).layers
    for index, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[index] = new_layer()
        elif type(layer).__name__ not in KEPT_LAYERS:
            raise ValueError(
                f"config: layer {index} of {config.model_type!r} needs a {type(layer).__name__}, which this cache "
                "cannot hold: use a DynamicCache for this model."
            )
    return layers


def _calling_implementation() -> str:
    """The `_attn_implementation` of the attention module that is calling `Cache.update`, for an error message."""
    frame = inspect.currentframe()
    while frame is not None:
        config = getattr(frame.f_locals.get("self"), "config", None)
        if hasattr(config, "_attn_implementation"):
            return repr(config._attn_implementation)
        frame = frame.f_back
    return "in use"
