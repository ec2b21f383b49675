"""Choose the cache layer of each layer of a model: full attention is paged, bounded layers stay as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer

from ..engine.forward import ForwardGuard
from ..engine.layer_settings import LayerSettings
from .head_groups import new_layer
from .paged_layer import PagedLayer
from .settings import Shares, check_offloading, checked_config, checked_shares, settings_of_layer


if TYPE_CHECKING:
    from .modes import Modes
    from .paged_layer import AnyLayer

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


class LayerPlan:
    """Decides the layers of a cache: by the config that the user gave, or by that of the first attention call.

    Args:
        settings, budget, shares: settings of all layers, and the budget and shares of each, see `settings_of_layer`.
        config: the config that the user gave to the cache, or None.
        offloading: whether the cache moves layers to CPU memory.
        modes: the modes of the cache, which new layers learn.

    Raises:
        TypeError, ValueError: `shares`, `config` or `offloading` cannot be used.
    """

    def __init__(
        self,
        settings: LayerSettings,
        budget: int | tuple[int, ...],
        shares: Shares | None,
        config: PreTrainedConfig | None,
        offloading: bool,
        modes: Modes,
    ):
        check_offloading(offloading)
        self._settings, self._budget = settings, budget
        self._shares = checked_shares(shares, settings, offloading)
        self._config, self._modes = checked_config(config), modes

    def settings_of(self, layer_idx: int) -> LayerSettings:
        """The settings of the paged layer `layer_idx`."""
        return settings_of_layer(self._settings, self._budget, self._shares, layer_idx)

    def first(self) -> list[AnyLayer]:
        """The layers of a new cache."""
        if self._config is None:
            return LayersToCome()
        layers = plan_layers(self._config, self.settings_of)
        warn_if_nothing_is_paged(layers, self._config.model_type, self._budget)
        return layers

    def for_model(self, layers: list[AnyLayer], config: PreTrainedConfig) -> list[AnyLayer]:
        """The layers of the cache; if it does not know its model, those that it will have for `config`."""
        return plan_layers(config, self.settings_of) if isinstance(layers, LayersToCome) else layers

    def check_known(self, layers: list[AnyLayer]) -> None:
        """Raise a ValueError if the cache does not know the config of its model."""
        if isinstance(layers, LayersToCome):
            raise ValueError(NEEDS_CONFIG)

    def check_recording(self, wanted: Sequence[int] | None) -> None:
        """Raise a ValueError if the KV heads of one of the layers `wanted` (None for all) have different shares."""
        for layer_idx, shares in enumerate(self._shares or ()):
            if len(set(shares)) > 1 and (wanted is None or layer_idx in wanted):
                raise ValueError(
                    f"shares differ between the KV heads of layer {layer_idx}, which raas_cache.record cannot show: "
                    "record other layers, or a cache with one share per layer."
                )

    def learn(
        self, cache: Cache, layer_idx: int, module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor
    ) -> bool:
        """Give a cache the layers of its model, whose config the first attention call provides.

        Where the model has full attention, a present layer is kept, because a compiled step from before a reset may
        refer to it. This is `LayerEngine.on_module`.

        Args:
            cache: the cache, whose layers are all paged so far.
            layer_idx: the layer whose attention was called. It has received `key` and `value`, and nothing else.
            module: its attention module.
            key, value: `[batch, kv_heads, new, head_dim]`.

        Returns:
            Whether the layer at `layer_idx` is still the same.
        """
        present, config = list(cache.layers), getattr(module, "config", None)
        if not isinstance(config, PreTrainedConfig):
            cache.layers = present
            return True
        learned = plan_layers(config, self.settings_of)
        self._modes.tell_new(learned)
        for index, layer in enumerate(learned):
            if isinstance(layer, PagedLayer) and index < len(present) and type(layer) is type(present[index]):
                learned[index] = present[index]
            elif index == layer_idx:
                layer.update(key, value)  # type: ignore[union-attr]  # it has attention
        warn_if_nothing_is_paged(learned, config.model_type, self._budget)
        if self._modes.rows is not None:
            self._modes.rows.check_layers(learned)
        cache.layers = learned
        return learned[layer_idx] is present[layer_idx]

    def after_reset(self, layers: list[AnyLayer]) -> list[AnyLayer]:
        """The layers of the cache after all of `layers` were emptied."""
        if self._config is None:
            # Layers that are not paged were chosen for this model. The next attention call chooses again.
            return LayersToCome(layers if all(isinstance(layer, PagedLayer) for layer in layers) else [])
        # In transformers 5.17, `reset` does not reset the length of a sliding window, so create new ones. This can go
        # when the package needs a later release.
        new = plan_layers(self._config, self.settings_of)
        return [new[i] if getattr(new[i], "is_sliding", False) else layer for i, layer in enumerate(layers)]


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
            layers[index] = new_layer(settings_of(index))
        elif kind == "LinearAttentionAndFullAttentionLayer" and isinstance(layer, LinearAttentionLayer):
            settings = settings_of(index)
            if len(set(settings.shares)) > 1:
                raise ValueError(
                    f"shares differ between the KV heads of layer {index}, which also has linear attention: give this "
                    "layer one share."
                )
            layers[index] = LinearAttentionAndPagedLayer(layer.number_of_states, settings)
        elif kind not in KEPT_LAYERS:
            raise ValueError(
                f"config: layer {index} of {config.model_type!r} needs a {kind}, which this cache does not support: "
                "use a DynamicCache for this model."
            )
    return layers


def warn_if_nothing_is_paged(layers: list[AnyLayer], model_type: str, budget: object) -> None:
    """Warn if no layer of a model has full attention."""
    if not any(isinstance(layer, PagedLayer) for layer in layers):
        warnings.warn(
            f"No layer of {model_type!r} has full attention, so there is nothing to evict: budget={budget} has no "
            "effect, and every layer keeps the bounded cache that transformers gives it.",
            stacklevel=5,
        )


def crop_layers(layers: list[AnyLayer], tokens_to_remove: int, guard: ForwardGuard) -> None:
    """Take back the last `-tokens_to_remove` tokens in all layers, or raise an error, see `PagedCache.crop`.

    Args:
        guard: marks the cache as unusable if an exception stops the change of the paged layers.
    """
    guard.check()
    # 1. Refuse before any layer changes.
    for index, layer in enumerate(layers):
        if isinstance(layer, PagedLayer):
            layer.check_crop(tokens_to_remove)
        if tokens_to_remove and not layer.is_croppable:
            raise RuntimeError(
                f"tokens_to_remove={tokens_to_remove}: layer {index} ({type(layer).__name__}) has one state for "
                "the whole past and cannot take tokens back. Do not pass assistant_model or "
                "prompt_lookup_num_tokens for this model."
            )
    # 2. The layers of transformers: a window without a record raises an error before a paged layer changes.
    for layer in layers:
        if not isinstance(layer, PagedLayer):
            layer.crop(tokens_to_remove)  # type: ignore[union-attr]  # as transformers calls it
    # 3. The paged layers.
    with guard.all_or_none():
        for layer in layers:
            if isinstance(layer, PagedLayer):
                layer.crop(tokens_to_remove)
