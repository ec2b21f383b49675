"""Which layer of a model gets which cache: RaaS pages full attention; what is bounded already stays as it is."""

from __future__ import annotations

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
            f"config: with recurrent_kv_cache_mode='last_loop' earlier loops of {config.model_type!r} read keys out of "
            "the cache by themselves, as if it held the whole sequence: use a DynamicCache for this model."
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
                f"config: layer {index} of {config.model_type!r} needs a {kind}, which this cache cannot hold: use a "
                "DynamicCache for this model."
            )
    return layers
