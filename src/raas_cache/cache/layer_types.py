"""Which layer of a model gets which cache: RaaS pages full attention; what is bounded already stays as it is."""

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

# Layers of transformers that stay beside the paged ones: none of them grows with the sequence.
KEPT_LAYERS = (
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)


class LinearAttentionAndPagedLayer(LinearAttentionLayer, PagedLayer):  # type: ignore[misc, override]
    """A layer with a linear-attention state and full attention side by side (Falcon-H1, Zamba): the latter is paged."""

    is_compileable = PagedLayer.is_compileable

    def __init__(self, number_of_states: int, settings: LayerSettings):
        PagedLayer.__init__(self, settings)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # `update` gives key and value by position, the linear-attention methods give their states by name.
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
    """Layers of a cache that has yet to learn the model's config; linear attention cannot wait for that."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and index >= len(self):
            raise ValueError(NEEDS_CONFIG)
        return super().__getitem__(index)


def plan_layers(config: PreTrainedConfig, settings_of: Callable[[int], LayerSettings]) -> list[AnyLayer]:
    """The cache layers that transformers would build for `config`, the full-attention ones paged.

    Args:
        config: the model's config, or that of its text decoder.
        settings_of: gives the settings of the paged layer of an index.

    Raises:
        ValueError: a layer of the model needs a cache that is neither bounded nor paged, or the model reads its cache
            by itself.
    """
    if getattr(config, "recurrent_kv_cache_mode", None) == "last_loop":
        # Slots read as positions would give plausible nonsense, and nothing else would notice.
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
    """The layers of a cache whose first attention call has told the model's config.

    Args:
        planned: what `plan_layers` made of the config.
        present: the layers so far, all of them paged. A paged layer stays where one is planned, because compiled steps
            may know it from before a reset.
        layer_idx: the layer that called, which holds `key` and `value` and nothing else yet.
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
