"""What an attention call brings: the settings of its softmax, what its mask says, and an expanded latent."""

from __future__ import annotations

from typing import TypedDict

import torch


Expanded = tuple[torch.Tensor, torch.Tensor]
"""Keys and values that a model expanded from a latent, `[rows, heads, slots, head_dim]`."""


class Softmax(TypedDict):
    """Settings of the softmax.

    Args:
        scale: factor on `q . k`.
        softcap: logits become `softcap * tanh(logits / softcap)`, or None.
        sinks: `[heads]`, an extra logit in the softmax of each head, which has no key and no value; or None.
    """

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None


class Seen(TypedDict, total=False):
    """What the attention mask says of a forward's tokens.

    Args:
        visible: `[rows, new]` bool, False where the mask hides a token; None if it hides no token.
        among: `[rows, new, new]` bool, whether a new token (second axis) sees another (third axis); None for causal.
        leading: for each row, the number of hidden tokens before its first visible token; None if it is not known.
    """

    visible: torch.Tensor | None
    among: torch.Tensor | None
    leading: list[int] | None
