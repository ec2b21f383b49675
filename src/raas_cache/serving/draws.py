"""Random numbers of requests: a request draws in any batch what it draws alone."""

from __future__ import annotations

import zlib

import torch

from ..engine.draw import WORD, mixed


class Draws:
    """The random numbers of a batch, one for each new token.

    A number is a function of the request's seed and of the number of tokens before the new one.

    Args:
        size: largest number of new tokens of a batch.
        seed: the seed from which the seeds of requests follow that have none of their own.
        device: device of the logits.

    Attributes:
        seeds: the seeds of requests that have one of their own, by request.
    """

    def __init__(self, size: int, seed: int, device: torch.device):
        self.seed, self.seeds = seed, dict[str, int]()
        self._keys = torch.zeros(2, size, dtype=torch.int64, device=device)

    def set(self, drawing: list[tuple[str, int]]) -> None:
        """Set the (request, number of tokens before the new one) of each new token of the next batch."""
        if drawing:
            keys = [(self._seed_of(request_id), tokens) for request_id, tokens in drawing]
            self._keys[:, : len(keys)] = torch.tensor(keys, dtype=torch.int64).T

    def uniform(self, count: int) -> torch.Tensor:
        """One number in (0, 1) for each of the first `count` new tokens, float64 `[count]`."""
        seeds, tokens = self._keys[:, :count]
        hashed: torch.Tensor = mixed(mixed(seeds) ^ (tokens & WORD))
        return (hashed.double() + 0.5) / (WORD + 1)

    def _seed_of(self, request_id: str) -> int:
        own = self.seeds.get(request_id)
        return (mixed(self.seed & WORD) ^ zlib.crc32(request_id.encode()) if own is None else own) & WORD
