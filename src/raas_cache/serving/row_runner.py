"""Runs the forwards of a batch, and draws the next token of each request with the request's own random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .draws import Draws
from .row_cache import RowCache
from .upstream import ContinuousBatchingIOs, CudaGraphBuffer, ModelRunner


class RowRunner(ModelRunner):
    """The runner of transformers, for rows: see `ModelRunner`.

    Args:
        draws: the random numbers of the next batch.
        arguments: the arguments of `ModelRunner`.
    """

    cache: RowCache
    inputs_and_outputs: ContinuousBatchingIOs

    def __init__(self, draws: Draws, **arguments: Any):
        super().__init__(**arguments)
        self.draws = draws
        self._shapes: object = None

    def compute_batch(self, model: nn.Module, batch_data: dict[str, Any]) -> None:
        """Run the forward of a batch, from a CUDA graph if all its tokens are decode tokens."""
        io = self.inputs_and_outputs
        if io.compute_stream is not None:  # the rows were changed, and the inputs written, on this stream
            io.compute_stream.wait_stream(torch.cuda.current_stream())
        if self.use_cuda_graph_decode and (shapes := self.cache.store.shapes) != self._shapes:
            io.graphs, self._shapes = CudaGraphBuffer(), shapes  # a graph holds the addresses of the buffers
        super().compute_batch(model, batch_data)

    def warmup(self, model: nn.Module) -> None:
        """Nothing: a graph is recorded in the first batch that needs it."""

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """Choose the next tokens.

        Args:
            scores: `[1, tokens, vocabulary]`.
            output_ids: `[1 or 2, tokens]` int32, for the tokens, and for the bits of their log probabilities.
        """
        if not self.do_sample:
            super()._sample(scores, output_ids)
            return
        # Inversion of the distribution function: the first token up to which the probabilities sum to the number.
        probabilities = scores[0].double().softmax(-1)  # [tokens, vocabulary]
        up_to = probabilities.cumsum(-1)
        count = len(up_to)
        number = self.draws.uniform(count)[:, None] * up_to[:, -1:]
        tokens = (up_to < number).sum(-1, keepdim=True)
        output_ids[0, :count].copy_(tokens[:, 0])
        if self.return_logprobs:
            logprobs = probabilities.gather(1, tokens)[:, 0].log().float()
            output_ids[1, :count].copy_(logprobs.view(torch.int32))
