"""Show in Triton: one launch for all layers of a cache that are of one shape.

A decode step of many layers would otherwise pay several launches a layer, and nearly every step changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...paged_kv import PagedKV


BLOCK_SLOTS = 1024
COLUMNS = 12  # numbers in a layer's row of the address table
MAX_TABLES = 64
_TABLES: dict[tuple[int, ...], Tensor] = {}


@triton.jit
def show_kernel(
    table, visible, heads, length,
    COLUMNS: tl.constexpr, BIAS: tl.constexpr, KEY: tl.constexpr, BOUND: tl.constexpr,
    BOUNDS: tl.constexpr, QUANTIZED: tl.constexpr, PACKED: tl.constexpr, BLOCKS: tl.constexpr, DK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_DK: tl.constexpr,
):  # fmt: skip
    """Program (layer, pair, block) serves BLOCK slots of one (row, KV head) of one layer: one page if it has bounds.

    A layer's row of `table` holds the addresses of its bias, positions, clock, keys, key_scales, key_min and key_max,
    its number of slots, the strides of its keys by row, KV head and slot, and the address of its open_slot, or with
    BLOCKS of its blocks, which hold its keys. The keys of a 4-bit cache are its open_keys.
    """
    layer, pair, block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    entry = table + layer * COLUMNS
    bias = tl.load(entry).to(tl.pointer_type(BIAS))
    positions = tl.load(entry + 1).to(tl.pointer_type(tl.int32))
    clock = tl.load(entry + 2).to(tl.pointer_type(tl.int64))
    slots = tl.load(entry + 7)
    row, head = pair // heads, pair % heads
    lane = block * BLOCK + tl.arange(0, BLOCK)
    inside = lane < slots
    slot = pair * slots + lane

    # 1. A slot holds a token if the clock has reached its position.
    position = tl.load(positions + slot, mask=inside, other=-1)
    told = (position >= 0) & (position <= tl.load(clock + pair * 2)) & (position < length)
    # 2. The mask says, by position, whether the token is visible.
    shown = tl.load(visible + row * length + position, mask=told, other=0)
    before = tl.load(bias + slot, mask=inside, other=float("-inf"))
    after = tl.where(told, tl.where(shown > 0, 0.0, float("-inf")), before)
    tl.store(bias + slot, after, mask=inside)

    # 3. A page whose visible tokens have changed gets new bounds.
    if BOUNDS:
        changed = tl.max((before != after).to(tl.int32), 0)
        key_row, key_lane, scale_at = row, lane, slot
        if PACKED:  # the codes of all pages but the open one count from their bounds, which must stay
            open_slot = tl.load(entry + 11).to(tl.pointer_type(tl.int64))
            is_open = (tl.load(open_slot + pair) == block * BLOCK) & ((tl.load(clock + pair * 2 + 1) + 1) % BLOCK != 0)
            changed = tl.where(is_open, changed, 0)
            key_lane = lane - block * BLOCK
        if BLOCKS:
            blocks = tl.load(entry + 11).to(tl.pointer_type(tl.int32))
            exists = block * BLOCK < slots  # layers of one launch may have different numbers of pages
            key_row = tl.load(blocks + row * (slots // BLOCK) + block, mask=exists, other=0).to(tl.int64)
            key_lane = lane - block * BLOCK
            scale_at = (key_row * heads + head) * BLOCK + key_lane
            changed = tl.where(key_row > 0, changed, 0)  # a page without memory has no keys
        if changed > 0:
            keys = tl.load(entry + 3).to(tl.pointer_type(KEY))
            key_min = tl.load(entry + 5).to(tl.pointer_type(BOUND))
            key_max = tl.load(entry + 6).to(tl.pointer_type(BOUND))
            keys += key_row * tl.load(entry + 8) + head * tl.load(entry + 9)
            dk = tl.arange(0, BLOCK_DK)
            mask = inside[:, None] & (dk[None, :] < DK)
            key = tl.load(keys + key_lane[:, None] * tl.load(entry + 10) + dk[None, :], mask=mask, other=0.0)
            key = key.to(tl.float32)
            if QUANTIZED:
                scales = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
                key *= tl.load(scales + scale_at, mask=inside, other=0.0)[:, None]
            is_visible = (after == 0.0)[:, None]
            low = tl.min(tl.where(is_visible, key, float("inf")), 0)
            high = tl.max(tl.where(is_visible, key, float("-inf")), 0)
            extreme = (pair * (slots // BLOCK) + block) * DK + dk
            tl.store(key_min + extreme, low.to(BOUND), mask=dk < DK)
            tl.store(key_max + extreme, high.to(BOUND), mask=dk < DK)


def show(kvs: Sequence[PagedKV], visible: Tensor) -> None:
    """See `raas_kernels.show`."""
    groups: dict[tuple[object, ...], list[PagedKV]] = {}
    for kv in kvs:
        keys = _keys(kv)
        kinds = kv.key_min is None, kv.is_packed, _has_keys_in_blocks(kv)
        shape = (kv.bias.shape[:2], keys.shape[-1], kv.page_size, keys.dtype, *kinds)
        groups.setdefault(shape, []).append(kv)
    for group in groups.values():
        _launch(group, visible.contiguous())


def _launch(kvs: list[PagedKV], visible: Tensor) -> None:
    first = kvs[0]
    batch, heads, _ = first.bias.shape
    has_bounds, dk = first.key_min is not None, _keys(first).shape[-1]
    block = first.page_size if has_bounds else BLOCK_SLOTS
    most_slots = max(kv.bias.shape[2] for kv in kvs)
    show_kernel[(len(kvs), batch * heads, triton.cdiv(most_slots, block))](
        _table(kvs), visible.view(torch.uint8), heads, visible.shape[1],
        COLUMNS=COLUMNS, BIAS=_triton_dtype(first.bias.dtype), KEY=_triton_dtype(_keys(first).dtype),
        BOUND=_triton_dtype(first.bias.dtype if first.key_min is None else first.key_min.dtype),
        BOUNDS=has_bounds, QUANTIZED=first.key_scales is not None, PACKED=first.is_packed,
        BLOCKS=_has_keys_in_blocks(first), DK=dk, BLOCK=block, BLOCK_DK=triton.next_power_of_2(dk),
    )  # fmt: skip


def _keys(kv: PagedKV) -> Tensor:
    """The keys from which the kernel computes bounds."""
    return kv.keys if kv.open_keys is None else kv.open_keys


def _has_keys_in_blocks(kv: PagedKV) -> bool:
    return kv.blocks is not None and not kv.is_packed


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, {torch.float8_e4m3fn: "float8e4nv"}.get(dtype, str(dtype).removeprefix("torch.")))


def _table(kvs: list[PagedKV]) -> Tensor:
    """The address table of some layers, on their device; copied there only if an address has changed."""
    device = kvs[0].bias.device
    entries: list[int] = [-1 if device.index is None else device.index]
    for kv in kvs:
        tensors = kv.bias, kv.positions, kv.clock, _keys(kv), kv.key_scales, kv.key_min, kv.key_max
        entries += [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        last = kv.open_slot if kv.blocks is None or kv.is_packed else kv.blocks
        entries += [kv.bias.shape[2], *_keys(kv).stride()[:3], last.data_ptr()]
    key = tuple(entries)
    if key not in _TABLES:
        if len(_TABLES) >= MAX_TABLES:
            _TABLES.clear()
        _TABLES[key] = torch.tensor(entries[1:], dtype=torch.int64).to(device, non_blocking=True)
    return _TABLES[key]
