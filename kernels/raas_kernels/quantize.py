"""8-bit codes of keys and values: each token of each KV head has a scale of its own."""

import torch
from torch import Tensor


CODE_RANGE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


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
