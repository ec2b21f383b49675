"""How a request of the server draws its tokens, and the logits processor for requests that do not draw."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from .upstream_server import ContinuousBatchingTemperatureLogitsWarper


LARGEST_TOP_K = 2**31 - 1  # keeps every token


@dataclass(frozen=True)
class Sampling:
    """The parameters of one request.

    Args:
        temperature: 0 for greedy decoding.
        top_p: keep the most likely tokens whose probabilities sum to this share.
        top_k: keep this number of the most likely tokens.
        seed: seed of the draws; None for a new one.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int | None = None

    @classmethod
    def of(cls, body: dict[str, Any], defaults: GenerationConfig) -> Sampling:
        """The parameters that the body of a request gives. Missing ones are those of the model's generation config."""
        usual = (defaults.temperature if defaults.temperature is not None else 1.0) if defaults.do_sample else 0.0
        return cls(
            temperature=float(body.get("temperature", usual)),
            top_p=float(body.get("top_p", 1.0 if defaults.top_p is None else defaults.top_p)),
            top_k=int(body.get("top_k", defaults.top_k or LARGEST_TOP_K)),
            seed=body.get("seed"),
        )

    def as_arguments(self) -> dict[str, Any]:
        """The arguments of `RowManager.add_request`."""
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed}


def with_every_parameter(defaults: GenerationConfig) -> GenerationConfig:
    """A generation config with which transformers creates processors for temperature, top_p and top_k.

    It leaves out a processor whose parameter would change nothing, and then no request could use the parameter. Each
    request brings its own values, so the values here are never used.
    """
    config = copy.deepcopy(defaults)
    config.do_sample, config.temperature, config.top_p, config.top_k = True, 0.5, 0.5, 1
    return config


class TemperatureOrGreedy(ContinuousBatchingTemperatureLogitsWarper):
    """transformers' processor for the temperature of each request, where temperature 0 keeps only the best token."""

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Divide the scores of each request by its temperature.

        Args:
            scores: `[tokens, vocabulary]` float32.
            tensor_arg: the temperatures, `[requests]` float32 as int32.
        """
        temperature = tensor_arg[: len(scores)].view(torch.float32)[:, None]  # [tokens, 1]
        is_greedy = temperature == 0
        best = scores.argmax(-1, keepdim=True)  # [tokens, 1]
        only_best = torch.full_like(scores, -torch.inf).scatter(-1, best, 0.0)
        return torch.where(is_greedy, only_best, scores / temperature.masked_fill(is_greedy, 1.0))
