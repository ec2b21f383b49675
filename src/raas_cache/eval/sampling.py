"""Sampling in which each row of a batch has its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class RowSampler(LogitsProcessor):
    """Draws the next token of each row with the row's own random numbers.

    The processor applies temperature, top-k and top-p in this order, as transformers does. It then draws a token by
    inversion of the distribution function, and sets the scores of all other tokens to minus infinity. `generate` with
    `do_sample=False` then takes the drawn token. torch's global generator is not used.

    Token `t` of a row needs one random number, which depends only on the row's key and `t`. A row therefore draws the
    same numbers in every batch and in every process, and with every cache. **The text may still differ between two
    batch sizes or two devices, through rounding**: if a random number lies within the rounding error of the border
    between two tokens (in float32, about one of a million tokens), another token is drawn, and the text goes on
    differently. bfloat16 and float16 round more coarsely, so expect this in long texts. The same batch on the same
    device gives the same text.

    Args:
        keys: one tuple of non-negative numbers per row of the batch, such as (seed, problem, sample).
        limit: largest number of new tokens.
        prompt_length: number of tokens of the padded prompts.
        temperature, top_p, top_k: see `Decoding`.
        device: device of the scores.
    """

    def __init__(
        self,
        keys: Sequence[tuple[int, ...]],
        limit: int,
        prompt_length: int,
        *,
        temperature: float,
        top_p: float,
        top_k: int,
        device: torch.device,
    ):
        self.prompt_length = prompt_length
        numbers = np.stack([_uniform(key, limit) for key in keys])
        self.numbers: torch.Tensor = torch.from_numpy(numbers).to(device)  # float64 [rows, limit]
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`input_ids`: `[rows, tokens]`. `scores`: `[rows, vocabulary]`, and so is the result."""
        # 1. The distribution of the next token. float64, because the sums of a large vocabulary lose digits in float32.
        warped = self.warpers(input_ids, scores)
        up_to = warped.double().softmax(-1).cumsum(-1)  # [rows, vocabulary]
        # 2. The first token up to which the probabilities sum to the random number or more. The number is above 0, so
        # this token has a probability above 0; it is at most 1 and is scaled by the sum, so there is such a token.
        number = self.numbers[:, input_ids.shape[1] - self.prompt_length, None]  # [rows, 1]
        drawn = (up_to < number * up_to[:, -1:]).sum(-1, keepdim=True)  # [rows, 1]
        # 3. All other tokens are impossible.
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)  # type: ignore[return-value]


def _uniform(key: tuple[int, ...], count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """`count` numbers in (0, 1] from a counter-based generator with this key. More numbers begin with the same ones."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    return 1 - generator.random(count)
