"""4-bit pages: the buffers that only they have, and the coding of keys page by page (`kv_dtype="int4"`).

The key codes of a page count from its key_min to its key_max, so a page's keys are coded together. Decode tokens wait
in `open_keys` until their page is full: `raas_kernels.append` codes it. Prefill pages are coded here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from raas_kernels import PagedKV, pack_page
from raas_kernels.contents import take_pages, unpack_keys


if TYPE_CHECKING:
    from .row_counts import Rows


class PrefillPlaces(Protocol):
    """What `write_prefill_keys` reads of `raas_cache.engine.prefill.Places`: `[rows]` int64 each."""

    dropped: np.ndarray
    room: np.ndarray
    tail: np.ndarray
    base: np.ndarray
    pages: np.ndarray

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


def check_head_sizes(key_size: int, value_size: int) -> None:
    """Raise a ValueError if a head size is odd: two 4-bit codes share a byte."""
    if key_size % 2 or value_size % 2:
        raise ValueError(
            f"kv_dtype='int4' stores two codes in a byte, but this model's head sizes are {key_size} (keys) and "
            f"{value_size} (values): use kv_dtype='int8'."
        )


def packed_buffers(key: torch.Tensor, value: torch.Tensor, batch_size: int, page_size: int) -> dict[str, torch.Tensor]:
    """The fields of a `PagedKV` without pages that only a 4-bit cache has, for keys and values of such shapes."""
    heads = key.shape[1]
    return {
        "open_keys": key.new_zeros(batch_size, heads, page_size, key.shape[-1]),
        "value_min": value.new_empty(batch_size, heads, 0),
        "value_max": value.new_empty(batch_size, heads, 0),
    }


def write_prefill_keys(
    kv: PagedKV, places: PrefillPlaces, key: torch.Tensor, hidden: torch.Tensor | None, rows: Rows | None
) -> None:
    """Code the keys of a prefill into their pages.

    If tokens fill the rest of a page, its earlier keys are decoded, and coded again together with the new keys.

    Args:
        places: the slots of the tokens.
        key: `[rows, kv_heads, new, head_dim]`, finite.
        hidden: `[rows, 1, new]` bool, the tokens that the mask hides; None for none.
        rows: the rows that the forward touches; None for all.
    """
    size, device, (count, heads, _, head_dim) = kv.page_size, key.device, key.shape
    # 1. For each row, the keys of the page that its tokens fill up, and of its new pages.
    pages = 1 + int(places.pages.max(initial=0))
    keys = key.new_zeros(count, heads, pages * size, head_dim)
    is_hidden = torch.ones(count, heads, pages * size, dtype=torch.bool, device=device)
    tail = np.minimum(places.tail // size, kv.num_pages - 1)
    if places.room.any():
        selected = torch.from_numpy(tail).to(device)[:, None, None].expand(-1, heads, 1)
        index = None if rows is None else rows.on_device
        keys[:, :, :size] = unpack_keys(kv, key.dtype, index, selected)
        is_hidden[:, :, :size] = take_pages(kv.bias, index, selected, size) != 0
    # 2. The new keys.
    row, token, slot = places.pairs()
    is_tail = token - places.dropped[row] < places.room[row]
    slot = slot % size + np.where(is_tail, 0, (1 + slot // size - places.base[row]) * size)
    at_row, at_token, at_slot = (torch.from_numpy(index).to(device) for index in (row, token, slot))
    keys[at_row, :, at_slot] = key[at_row, :, at_token]
    is_hidden[at_row, :, at_slot] = False if hidden is None else hidden[at_row, :, at_token]
    # 3. Their codes and bounds, to the pages of the table.
    codes, key_min, key_max = pack_page(keys.unflatten(2, (-1, size)), is_hidden.unflatten(2, (-1, size)))
    is_written = np.column_stack([places.room > 0, np.arange(pages - 1) < places.pages[:, None]])
    row, nth = np.nonzero(is_written)
    page = np.where(nth == 0, tail[row], places.base[row] + nth - 1)
    source, at_nth, at_page = (torch.from_numpy(index).to(device) for index in (row, nth, page))
    target = source if rows is None else rows.on_device[source]
    if kv.blocks is None:
        kv.keys.unflatten(2, (-1, size))[target, :, at_page] = codes[source, :, at_nth]
    else:
        kv.keys[kv.blocks[target, at_page].long()] = codes[source, :, at_nth]
    for kept, new in ((kv.key_min, key_min), (kv.key_max, key_max)):
        assert kept is not None
        kept[target, :, at_page] = new[source, :, at_nth]


def pack_open_pages(kv: PagedKV, rows: torch.Tensor) -> None:
    """Code the keys of the open pages of `rows` `[batch]` bool, which are closed before they are full."""
    assert kv.open_keys is not None and kv.key_min is not None and kv.key_max is not None
    size = kv.page_size
    page = (kv.open_slot // size)[..., None]  # [batch, kv_heads, 1]
    bias = take_pages(kv.bias, None, page, size)  # [batch, kv_heads, page_size]
    codes, key_min, key_max = pack_page(kv.open_keys, bias != 0)
    is_closing = (kv.is_open & rows[:, None])[..., None, None]
    by_page = kv.keys.unflatten(2, (-1, size)).flatten(3)  # [batch, kv_heads, pages, page_size * head_dim / 2]
    for kept, new in ((by_page, codes.flatten(2)), (kv.key_min, key_min), (kv.key_max, key_max)):
        index = page[..., None].expand(-1, -1, 1, kept.shape[-1])
        kept.scatter_(2, index, torch.where(is_closing, new[:, :, None], kept.gather(2, index)))
