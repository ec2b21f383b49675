"""Show in plain torch: the engine of CPU tensors and of `torch.compile`, and the standard of the Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...paged_kv import PagedKV
from ..page_bounds.reference import refresh_extremes


def show(kvs: Sequence[PagedKV], visible: Tensor) -> None:
    """See `raas_kernels.show`."""
    length = visible.shape[1]
    for kv in kvs:
        # 1. A slot holds a token if the clock has reached its position: an open page's free slots have later ones.
        has_token = (kv.positions >= 0) & (kv.positions <= kv.clock[..., :1])  # [B, H, N]
        is_told = has_token & (kv.positions < length)

        # 2. The mask says, by position, whether the token is visible.
        index = kv.positions.clamp(min=0, max=length - 1).long()
        shown = visible[:, None].expand(-1, kv.bias.shape[1], -1).gather(2, index)
        told = torch.where(shown, 0.0, float("-inf")).to(kv.bias.dtype)
        kv.bias.copy_(torch.where(is_told, told, kv.bias))

        # 3. The bounds of each page's visible keys.
        refresh_extremes(kv)
