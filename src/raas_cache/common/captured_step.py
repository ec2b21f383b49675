"""A decode step as one CUDA graph, recorded without a compiler in less than a second."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..cache.paged_cache import PagedCache
from ..cache.paged_layer import PagedLayer, holding_pages
from .upstream import CACHE_ARGUMENT


EAGER_STEPS = 3
"""Steps before the recording. In the first of them Triton compiles kernels and a page may be allocated."""


class CapturedStep:
    """The decode step of a model with one cache. After a few eager steps, it is recorded as a CUDA graph and replayed.

    A replay costs the host one call, however many kernels the step has. The recorded step gets no mask: the padding of
    the prompt is not in the pages, and all later tokens are visible.

    Args:
        model: a model on a GPU.
        cache: a cache for which `can_capture` is True. It allocates its whole budget at its next forward, so it should
            be empty.
    """

    def __init__(self, model: PreTrainedModel, cache: PagedCache):
        self.cache, self._model_forward = cache, model.forward
        self._replay: Callable[[], None] | None = None
        self._steps = 0
        cache.preallocate()

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Run one step.

        Args:
            input_ids: `[batch, 1]` int64.
            position_ids: `[batch, 1]` int64, the positions of the tokens, if a prompt has padding. None is the number
                of earlier tokens. All steps have positions, or none has.

        Returns:
            Logits `[batch, vocabulary]`. The next step overwrites them.
        """
        inputs = [input_ids] if position_ids is None else [input_ids, position_ids]
        if self._replay is None and self._steps < EAGER_STEPS:
            self._steps += 1
            return self._forward(*inputs)
        if self._replay is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            self._replay, self._logits = capture(lambda: self._forward(*self._inputs))
        for buffer, given in zip(self._inputs, inputs, strict=True):
            buffer.copy_(given)
        self._replay()
        for layer in holding_pages(self.cache.layers):
            layer.table.clock_moved()
        return self._logits

    def _forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        inputs: dict[str, Any] = {CACHE_ARGUMENT: self.cache, "logits_to_keep": 1}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        logits: torch.Tensor = self._model_forward(input_ids, **inputs).logits[:, -1]
        return logits


@contextmanager
def captured_forward(model: PreTrainedModel, cache: Cache) -> Iterator[None]:
    """Inside this context, `generate` runs the decode steps with `cache` from a CUDA graph, if that is possible."""
    if not can_capture(cache, model):
        yield
        return
    step, forward = CapturedStep(model, cache), model.forward

    @functools.wraps(forward)
    def replaying(input_ids: torch.Tensor | None = None, position_ids: Any = None, **inputs: Any) -> Any:
        if input_ids is None or input_ids.shape[1] > 1 or not cache.get_seq_length():
            return forward(input_ids=input_ids, position_ids=position_ids, **inputs)
        return CausalLMOutputWithPast(logits=step(input_ids, position_ids)[:, None], past_key_values=cache)  # type: ignore[call-arg]

    own = vars(model).get("forward")  # a wrapper of another library; None for the method of the class
    model.forward = replaying
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


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
