"""A decode step as one CUDA graph, recorded without a compiler in less than a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from transformers import PreTrainedModel

from ..cache.paged_cache import PagedCache
from ..cache.paged_layer import PagedLayer, holding_pages
from .upstream import CACHE_ARGUMENT


EAGER_STEPS = 3
"""Steps before the recording. In the first of them Triton compiles kernels and a page may be allocated."""


class CapturedStep:
    """The decode step of a model with one cache. After a few eager steps, it is recorded as a CUDA graph and replayed.

    A replay costs the host one call, however many kernels the step has. The rows of the cache have the same length, and
    none has padding, because the recorded step gets no mask.

    Args:
        model: a model on a GPU.
        cache: a cache for which `can_capture` is True. It allocates its whole budget at its next forward, so it should
            be empty.
    """

    def __init__(self, model: PreTrainedModel, cache: PagedCache):
        self.model, self.cache = model, cache
        self._replay: Callable[[], None] | None = None
        self._steps = 0
        cache.preallocate()

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Run one step.

        Args:
            input_ids: `[batch, 1]` int64.

        Returns:
            Logits `[batch, vocabulary]`. The next step overwrites them.
        """
        if self._replay is None and self._steps < EAGER_STEPS:
            self._steps += 1
            return self._forward(input_ids)
        if self._replay is None:
            self._ids = input_ids.clone()
            self._replay, self._logits = capture(lambda: self._forward(self._ids))
        self._ids.copy_(input_ids)
        self._replay()
        for layer in holding_pages(self.cache.layers):
            layer.table.clock_moved()
        return self._logits

    def _forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        inputs: dict[str, Any] = {CACHE_ARGUMENT: self.cache}
        logits: torch.Tensor = self.model(input_ids, logits_to_keep=1, **inputs).logits[:, -1]
        return logits


def can_capture(cache: object, model: PreTrainedModel) -> TypeGuard[PagedCache]:
    """Whether one CUDA graph can run all decode steps of a model with a cache."""
    return (
        model.device.type == "cuda"
        and isinstance(cache, PagedCache)
        and cache.is_compileable
        and all(isinstance(layer, PagedLayer) for layer in cache.layers)
    )


def capture(forward: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Record a forward without running it. Returns a function that runs it, and the tensor with its result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward()
    return graph.replay, result
