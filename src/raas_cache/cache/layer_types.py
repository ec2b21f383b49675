"""Choose the cache layer of each layer of a model: full attention is paged, bounded layers stay as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from ..engine.layer_settings import LayerSettings
from .paged_layer import PagedLayer


if TYPE_CHECKING:
    from transformers.cache_utils import CacheLayerMixin, DummyLayer, LinearAttentionCacheLayerMixin

    AnyLayer = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer

# Layers of transformers 5.17 to 5.24 that are used beside paged layers. None of them grows with the sequence.
KEPT_LAYERS = (
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)


class LinearAttentionAndPagedLayer(LinearAttentionLayer, PagedLayer):  # type: ignore[misc, override]
    """A layer with linear attention and full attention (Falcon-H1, Zamba): the full attention is paged."""

    is_compileable = PagedLayer.is_compileable

    def __init__(self, number_of_states: int, settings: LayerSettings):
        PagedLayer.__init__(self, settings)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # In transformers 5.17 to 5.24, `update` passes key and value by position, linear attention its states by name.
        (PagedLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        PagedLayer.reset(self)

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)
        PagedLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)
        PagedLayer.prefetch(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        PagedLayer.reorder_cache(self, beam_idx)

    def activate_past_recording(self) -> None:
        LinearAttentionLayer.activate_past_recording(self)
        PagedLayer.activate_past_recording(self)

    def crop(self, tokens_to_remove: int) -> None:
        PagedLayer.crop(self, tokens_to_remove)
        LinearAttentionLayer.crop(self, tokens_to_remove)


NEEDS_CONFIG = (
    "This model starts with a linear-attention layer, so the cache needs its config: use "
    "RaaSCache(budget, config=model.config)."
)


class LayersToCome(list["AnyLayer"]):
    """Layers of a cache that does not know the model's config yet.

    A model that starts with linear attention asks for a layer before the first attention call: an error names `config`.
    """

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and index >= len(self):
            raise ValueError(NEEDS_CONFIG)
        return super().__getitem__(index)


def plan_layers(config: PreTrainedConfig, settings_of: Callable[[int], LayerSettings]) -> list[AnyLayer]:
    """The cache layers that transformers would create for `config`, with paged layers for full attention.

    Args:
        config: config of the model, or of its text decoder.
        settings_of: returns the settings of the paged layer at an index.

    Raises:
        ValueError: a layer of the model needs a cache that is neither bounded nor paged, or the model reads the buffers
            of its cache directly.
    """
    if getattr(config, "recurrent_kv_cache_mode", None) == "last_loop":
        # The model would take slots for positions, and generate wrong text without an error.
        raise ValueError(
            f"config: with recurrent_kv_cache_mode='last_loop', {config.model_type!r} reads keys directly from the "
            "buffers of the cache and expects the whole sequence there: use a DynamicCache for this model."
        )
    layers = DynamicCache(config=config).layers
    for index, layer in enumerate(layers):
        kind = type(layer).__name__
        if kind == "DynamicLayer":
            layers[index] = PagedLayer(settings_of(index))
        elif kind == "LinearAttentionAndFullAttentionLayer" and isinstance(layer, LinearAttentionLayer):
            layers[index] = LinearAttentionAndPagedLayer(layer.number_of_states, settings_of(index))
        elif kind not in KEPT_LAYERS:
            raise ValueError(
                f"config: layer {index} of {config.model_type!r} needs a {kind}, which this cache does not support: "
                "use a DynamicCache for this model."
            )
    return layers


def learn_layers(
    planned: list[AnyLayer], present: list[AnyLayer], layer_idx: int, key: torch.Tensor, value: torch.Tensor
) -> list[AnyLayer]:
    """The layers of a cache that learns the model's config from its first attention call.

    Args:
        planned: the result of `plan_layers`.
        present: the layers so far, all of them paged. Where `planned` has a paged layer, the present layer is kept,
            because a compiled step from before a reset may refer to it.
        layer_idx: the layer whose attention was called. It has received `key` and `value`, and nothing else.
        key, value: `[batch, kv_heads, new, head_dim]`.
    """
    layers: list[AnyLayer] = []
    for index, layer in enumerate(planned):
        if isinstance(layer, PagedLayer) and index < len(present) and type(layer) is type(present[index]):
            layer = present[index]
        elif index == layer_idx:
            layer.update(key, value)  # type: ignore[union-attr]  # it has attention
        layers.append(layer)
    return layers


def warn_if_nothing_is_paged(layers: list[AnyLayer], model_type: str, budget: object) -> None:
    """Warn if no layer of a model has full attention."""
    if not any(isinstance(layer, PagedLayer) for layer in layers):
        warnings.warn(
            f"No layer of {model_type!r} has full attention, so there is nothing to evict: budget={budget} has no "
            "effect, and every layer keeps the bounded cache that transformers gives it.",
            stacklevel=4,
        )
