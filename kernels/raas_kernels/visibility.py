"""Attention masks that change what is visible of the past: which held tokens attention may read.

A 2-d attention mask speaks of every token seen so far. What it says of the new tokens goes into the store with them;
what it says of the past is written into the bias here, for all layers of a cache at once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import dequantize, page_extremes


class Held(NamedTuple):
    """What `show` needs of one layer's store; shapes as in the package docstring.

    Args:
        bias: `[B, H, N]`, written in place.
        positions: `[B, H, N]` int32.
        clock: `[B, H, 2]` int64.
        keys: `[B, H, N, Dk]`, codes in their own dtype for an 8-bit store.
        key_scales: `[B, H, N]` float32 for an 8-bit store, otherwise None.
        minima, maxima: `[B, H, P, Dk]`, written in place, or None where a store keeps no bounds.
        page_size: S, tokens a page.
    """

    bias: Tensor
    positions: Tensor
    clock: Tensor
    keys: Tensor
    key_scales: Tensor | None
    minima: Tensor | None
    maxima: Tensor | None
    page_size: int


def show(layers: Sequence[Held], visible: Tensor) -> None:
    """Let attention read the held tokens that `visible` names, and no others; pages' bounds follow.

    In plain torch, for every device, and for `torch.compile` to trace. On CUDA `raas_kernels.show` does the same in
    one launch.

    Args:
        layers: the stores, on the device of `visible`.
        visible: `[B, T]` bool, by sequence index. Tokens from index T on stay as they are.
    """
    for held in layers:
        heads, length = held.bias.shape[1], visible.shape[1]
        # A slot holds a token if its position has been reached: an open page's free slots have positions to come.
        is_held = (held.positions >= 0) & (held.positions <= held.clock[..., :1])
        is_told = is_held & (held.positions < length)
        index = held.positions.clamp(min=0, max=length - 1).long()
        shown = visible[:, None].expand(-1, heads, -1).gather(2, index)
        told = torch.where(shown, 0.0, float("-inf")).to(held.bias.dtype)
        held.bias.copy_(torch.where(is_told, told, held.bias))
        if held.minima is not None and held.maxima is not None:
            keys = held.keys
            if held.key_scales is not None:
                keys = dequantize(keys, held.key_scales, held.minima.dtype)
            for bounds, extremes in zip(
                (held.minima, held.maxima), page_extremes(keys, held.bias, held.page_size), strict=True
            ):
                bounds.copy_(extremes)
