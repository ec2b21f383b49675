"""Whether a decode step with a cache can be compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from ..attention.dispatch import DISPATCHED
from .model_probe import calling_module, can_compile, generate_compiles, is_asked_by_generate


if TYPE_CHECKING:
    from .layer_types import LayerPlan
    from .modes import Modes
    from .paged_layer import AnyLayer


class CompiledStep:
    """Whether the decode step of the model that uses a cache can be compiled; None if no model has asked."""

    def __init__(self) -> None:
        self._suits_model: bool | None = None

    def is_possible(self, modes: Modes, layers: list[AnyLayer], plan: LayerPlan) -> bool:
        """See `PagedCache.is_compileable`. If `generate` compiles the step, the cache preallocates from now on.

        Args:
            modes: the modes of the cache.
            layers: the layers of the cache.
            plan: chooses the layers if the cache does not know the model yet.
        """
        if modes.forbid_compilation:
            return False
        if not torch.compiler.is_compiling() and (self._suits_model is None or is_asked_by_generate()):
            model = calling_module(PreTrainedModel)
            if model is not None:
                chosen = plan.for_model(layers, model.config)
                compiles = generate_compiles(model.device)
                suits = can_compile(model, DISPATCHED) and all(layer.is_compileable for layer in chosen)
                self._suits_model = suits and compiles is not False
                modes.preallocates |= bool(suits and compiles)
        return self._suits_model is not False and all(layer.is_compileable for layer in layers)
