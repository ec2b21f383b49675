"""Random numbers that are a function of counters: a draw needs no generator and no state.

A draw is the hash of its seed and of its place (head, step, page). It is therefore the same on every device, in a
compiled step and after tokens were taken back, and the random state of torch does not change.
"""

from __future__ import annotations

from typing import TypeVar

import torch


WORD = 0xFFFFFFFF  # hashes have 32 bits
IntOrTensor = TypeVar("IntOrTensor", int, torch.Tensor)


def mixed(word: IntOrTensor) -> IntOrTensor:
    """A hash of `word` in which every bit of `word` decides about every bit. All values lie in [0, 2**32).

    The form is xor-shift, multiply, xor-shift, multiply, xor-shift, as in the finaliser of MurmurHash3. Both factors
    are smaller than 2**31, so that no product overflows int64.
    """
    word = word ^ (word >> 16)
    word = (word * 0x21F0AAAD) & WORD
    word = word ^ (word >> 15)
    word = (word * 0x735A2D97) & WORD
    return word ^ (word >> 15)


def layer_seed(seed: int, layer_idx: int) -> int:
    """A seed for the draws of the layer `layer_idx`, in [0, 2**32)."""
    return mixed(mixed(seed & WORD) ^ layer_idx)


def uniform(seed: int, clock: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) for each page, drawn again at each step.

    The number depends on `seed`, the KV head, the decode-token index, and the age of the page in tokens. It does not
    depend on left padding or on other rows, so that a row draws in a batch what it draws alone.

    Args:
        seed: in [0, 2**32).
        clock: `[batch, kv_heads, 2]` int64, (sequence index, decode-token index) of the newest token.
        first: `[batch, kv_heads, pages]` int32, sequence index of the first token of each page.

    Returns:
        `[batch, kv_heads, pages]` float64.
    """
    heads = torch.arange(clock.shape[1], device=clock.device)[:, None]  # [kv_heads, 1]
    of_head = mixed(heads ^ mixed(seed))
    of_step = mixed(of_head ^ (clock[..., 1:] & WORD))  # [batch, kv_heads, 1]
    of_page = mixed(of_step ^ ((clock[..., :1] - first) & WORD))  # [batch, kv_heads, pages]
    return of_page.double() / (WORD + 1)
