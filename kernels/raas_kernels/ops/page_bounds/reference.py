"""Page bounds in plain torch: the engine of CPU tensors, and the standard of the Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contents import key_states, take_pages
from ...paged_kv import PagedKV, take_rows
from ..attend.reference import cap


def page_extremes(keys: Tensor, bias: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """The key_min and key_max of each page's visible keys.

    Args:
        keys: `[B, H, N, Dk]`, decoded if the cache holds 8-bit codes.
        bias: `[B, H, N]`, 0 for the visible keys.

    Returns:
        Two `[B, H, P, Dk]` in the keys' dtype; inf and -inf for a page without a visible key.
    """
    pages = keys.unflatten(2, (-1, page_size))  # [B, H, P, S, Dk]
    empty = bias.unflatten(2, (-1, page_size))[..., None] < 0
    return pages.masked_fill(empty, float("inf")).amin(3), pages.masked_fill(empty, float("-inf")).amax(3)


def page_logit_bounds(
    kv: PagedKV, query: Tensor, scale: float, softcap: float | None = None, rows: Tensor | None = None
) -> Tensor:
    """See `raas_kernels.page_logit_bounds`."""
    # 1. Bounds of the keys, [R, H, P, Dk]; 0 for pages without a visible token, whose bounds are infinite.
    bias = take_rows(kv.bias, rows)
    key_min, key_max = extremes_of(kv, rows)
    batch, heads, pages, _ = key_min.shape
    is_empty = bias.reshape(batch, heads, pages, kv.page_size).amax(-1) != 0  # [R, H, P]
    low, high = (bound.to(bias.dtype).masked_fill(is_empty[..., None], 0) for bound in (key_min, key_max))

    # 2. max(q * min, q * max) is q * max where q > 0 and q * min where q < 0: two matrix products.
    grouped = query.reshape(batch, heads, -1, query.shape[-1]).to(bias.dtype)  # [R, H, G, Dk]
    bounds = grouped.clamp(min=0) @ high.mT + grouped.clamp(max=0) @ low.mT  # [R, H, G, P]
    return cap(bounds.amax(2) * scale, softcap).masked_fill_(is_empty, float("-inf"))


def extremes_of(kv: PagedKV, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`[R, H, P, Dk]` key_min and key_max of a cache, computed of its keys if it keeps none."""
    if kv.key_min is not None and kv.key_max is not None:
        return take_rows(kv.key_min, rows), take_rows(kv.key_max, rows)
    dtype = kv.keys.dtype if kv.key_scales is None else torch.float32
    return page_extremes(key_states(kv, dtype, rows), take_rows(kv.bias, rows), kv.page_size)


def refresh_extremes(kv: PagedKV) -> None:
    """Compute the key_min and key_max that a cache keeps again, from its bias.

    In a 4-bit cache only those of the open page, because the codes of all other pages count from them.
    """
    if kv.key_min is None or kv.key_max is None:
        return
    if kv.open_keys is None:
        keys = key_states(kv, kv.key_min.dtype)
        for kept, new in zip((kv.key_min, kv.key_max), page_extremes(keys, kv.bias, kv.page_size), strict=True):
            kept.copy_(new)
        return
    page = (kv.open_slot // kv.page_size)[..., None]  # [B, H, 1]
    index = page[..., None].expand(-1, -1, -1, kv.key_min.shape[-1])  # [B, H, 1, Dk]
    bias = take_pages(kv.bias, None, page, kv.page_size)  # [B, H, S]
    for kept, new in zip((kv.key_min, kv.key_max), page_extremes(kv.open_keys, bias, kv.page_size), strict=True):
        kept.scatter_(2, index, torch.where(kv.is_open[..., None, None], new, kept.gather(2, index)))
