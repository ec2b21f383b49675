"""The keys and values that a cache holds, as numbers: stored as they are, as 8-bit codes or as 4-bit codes."""

from __future__ import annotations

import torch
from torch import Tensor

from .paged_kv import PagedKV, take_rows
from .quantize import dequantize, unpack


def key_states(kv: PagedKV, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """The keys of all slots in `dtype`, `[R, H, N, Dk]`.

    Args:
        rows: `[R]` int64, the batch rows; None for all.
    """
    if kv.is_packed:
        return unpack_keys(kv, dtype, rows)
    return _states(kv, kv.keys, kv.key_scales, dtype, rows)


def value_states(kv: PagedKV, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """The values of all slots in `dtype`, `[R, H, N, Dv]`; `rows` as in `key_states`."""
    if kv.is_packed:
        return unpack_values(kv, dtype, rows)
    return _states(kv, kv.values, kv.value_scales, dtype, rows)


def unpack_keys(kv: PagedKV, dtype: torch.dtype, rows: Tensor | None = None, selected: Tensor | None = None) -> Tensor:
    """The keys of a 4-bit cache in `dtype`; the open page's come from `open_keys`.

    Args:
        selected: `[R, H, K]` int64, the pages wanted; any page for -1. None for all pages.

    Returns:
        `[R, H, K * S, Dk]`.
    """
    assert kv.key_min is not None and kv.key_max is not None and kv.open_keys is not None
    size = kv.page_size
    # 1. The codes between the bounds of their page, [R, H, K, S, Dk].
    codes = take_pages(kv.keys, rows, selected, size, kv.blocks).unflatten(2, (-1, size))
    low, high = (take_pages(bound, rows, selected, 1)[:, :, :, None] for bound in (kv.key_min, kv.key_max))
    keys = unpack(codes, low, high, dtype)
    # 2. The open page, at `place` [R, H, 1] among the pages wanted.
    page = torch.where(kv.is_open, kv.open_slot // size, -2)  # -2 is no page
    page, open_keys = take_rows(page, rows)[..., None], take_rows(kv.open_keys, rows)[:, :, None].to(dtype)
    is_page = (torch.arange(kv.num_pages, device=page.device) if selected is None else selected) == page  # [R, H, K]
    place, is_wanted = is_page.int().argmax(-1, keepdim=True), is_page.any(-1, keepdim=True)
    index = place[..., None, None].expand_as(open_keys)  # [R, H, 1, S, Dk]
    keys.scatter_(2, index, torch.where(is_wanted[..., None, None], open_keys, keys.gather(2, index)))
    return keys.flatten(2, 3)


def unpack_values(
    kv: PagedKV, dtype: torch.dtype, rows: Tensor | None = None, selected: Tensor | None = None
) -> Tensor:
    """The values of a 4-bit cache in `dtype`, `[R, H, K * S, Dv]`; arguments as for `unpack_keys`."""
    assert kv.value_min is not None and kv.value_max is not None
    codes, low, high = (
        take_pages(buffer, rows, selected, kv.page_size, kv.blocks)
        for buffer in (kv.values, kv.value_min, kv.value_max)
    )
    return unpack(codes, low[..., None], high[..., None], dtype)


def take_pages(
    tensor: Tensor, rows: Tensor | None, selected: Tensor | None, entries: int, blocks: Tensor | None = None
) -> Tensor:
    """The pages `selected` `[R, H, K]` of a buffer `[B, H, P * entries, ...]`: `[R, H, K * entries, ...]`.

    Page 0 takes the place of -1, and of a page without memory. All pages of the rows for None.

    Args:
        blocks: `[B, P]` int32, for a buffer `[blocks, H, entries, ...]`: the block of each page.
    """
    if selected is None and blocks is None:
        return take_rows(tensor, rows)
    movable = tensor.view(torch.int8) if tensor.dtype == torch.float8_e4m3fn else tensor  # torch cannot index float8
    pages: Tensor = movable.unflatten(2, (-1, entries))  # [B, H, P, entries, ...], or [blocks, H, 1, entries, ...]
    head = torch.arange(tensor.shape[1], device=tensor.device)[:, None]  # [H, 1]
    if blocks is not None:
        block = take_rows(blocks, rows)[:, None].long()  # [R, 1, P]
        block = torch.where(block > 0, block, block[..., :1])
        if selected is not None:
            block = block.expand(-1, len(head), -1).gather(2, selected.clamp(min=0))
        row, page = block, torch.zeros_like(block)  # [R, H or 1, K]
    else:
        assert selected is not None
        row = (torch.arange(len(selected), device=tensor.device) if rows is None else rows)[:, None, None]
        page = selected.clamp(min=0)
    if tensor.is_contiguous():  # index_select copies whole pages, in a third of the time
        index = (row * tensor.shape[1] + head) * pages.shape[2] + page
        picked: Tensor = pages.flatten(0, 2).index_select(0, index.flatten()).unflatten(0, index.shape)
    else:
        picked = pages[row, head, page]
    return picked.flatten(2, 3).view(tensor.dtype)


def _states(kv: PagedKV, states: Tensor, scales: Tensor | None, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
    states = take_pages(states, rows, None, kv.page_size, kv.blocks)
    if scales is None:
        return states.to(dtype)
    return dequantize(states, take_pages(scales, rows, None, kv.page_size, kv.blocks), dtype)
