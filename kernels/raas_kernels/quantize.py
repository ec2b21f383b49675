"""Codes of keys and values: 8 bits with one scale for each token, or 4 bits between two bounds."""

import torch
from torch import Tensor


CODE_RANGE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LARGEST_CODE = 15  # of 4 bits


def quantize(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """8-bit codes of `states` `[..., D]` in `dtype`, and float32 scales `[...]`: states = codes * scale, rounded."""
    largest = states.abs().amax(-1).float()
    scales = torch.where(largest == 0, 1.0, largest / CODE_RANGE[dtype])
    codes = (states.float() / scales[..., None]).clamp_(-CODE_RANGE[dtype], CODE_RANGE[dtype])
    # int8 codes are rounded half up; the conversion to float8 rounds by itself.
    return (codes.add_(0.5).floor_() if dtype == torch.int8 else codes).to(dtype), scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The states `[..., D]` in `dtype` of `codes` `[..., D]` and `scales` `[...]`, which `quantize` returned."""
    accumulate = torch.promote_types(dtype, torch.float32)
    return (codes.to(accumulate) * scales[..., None]).to(dtype)


def pack(states: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """4-bit codes of `states` between two bounds, two codes to a byte.

    The code c, from 0 to 15, stands for `low + c * (high - low) / 15`. A number beyond a bound gets the code of this
    bound. Byte i of a token has the code of dimension i in its low four bits, of dimension i + D / 2 in its high four.

    Args:
        states: `[..., D]`, finite; D is even.
        low, high: the bounds; they broadcast against `states`.

    Returns:
        `[..., D / 2]` uint8.
    """
    accumulate = torch.promote_types(states.dtype, torch.float32)
    low, step = _low_and_step(low, high, accumulate)
    steps = torch.where(step > 0, (states.to(accumulate) - low) / step, 0)
    codes = steps.add_(0.5).floor_().clamp_(0, LARGEST_CODE).to(torch.uint8)  # rounded half up
    first, second = codes.chunk(2, -1)
    return first | (second << 4)


def unpack(codes: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """The states `[..., D]` in `dtype` of `codes` `[..., D / 2]`, which `pack` returned for the same bounds."""
    accumulate = torch.promote_types(dtype, torch.float32)
    low, step = _low_and_step(low, high, accumulate)
    return torch.cat([codes & LARGEST_CODE, codes >> 4], -1).to(accumulate).mul_(step).add_(low).to(dtype)


def pack_values(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit codes `[..., Dv / 2]` of `values` `[..., Dv]`; each value's smallest and largest number, `[...]`."""
    low, high = values.amin(-1), values.amax(-1)
    return pack(values, low[..., None], high[..., None]), low, high


def pack_page(keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit codes of the keys of a page: each channel between the smallest and the largest visible key.

    A hidden key widens no bound, except in a page that has only hidden keys.

    Args:
        keys: `[..., S, Dk]`, finite.
        hidden: `[..., S]` bool, whether the mask hides a token, or the slot has none.

    Returns:
        Codes `[..., S, Dk / 2]` uint8; key_min and key_max `[..., Dk]` in the keys' dtype.
    """
    ignored = (hidden & ~hidden.all(-1, keepdim=True))[..., None]  # [..., S, 1]
    low = keys.masked_fill(ignored, float("inf")).amin(-2)
    high = keys.masked_fill(ignored, float("-inf")).amax(-2)
    return pack(keys, low[..., None, :], high[..., None, :]), low, high


def _low_and_step(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low = low.to(dtype)
    return low, (high.to(dtype) - low) * (1 / LARGEST_CODE)
