"""`visibility.show` in Triton: one launch for all layers of a cache that are of one shape.

A decode step of many layers would otherwise pay for several launches a layer, to change nothing in nearly every step.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .visibility import Held


BLOCK_SLOTS = 1024
COLUMNS = 7  # addresses a layer has in the table of them
MAX_TABLES = 64
_TABLES: dict[tuple[int, ...], Tensor] = {}


@triton.jit
def show_kernel(
    table, visible, heads, length,
    COLUMNS: tl.constexpr, BIAS: tl.constexpr, KEY: tl.constexpr, BOUND: tl.constexpr,
    BOUNDS: tl.constexpr, QUANTIZED: tl.constexpr, DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DK: tl.constexpr,
):  # fmt: skip
    """Program (layer, row, block) serves BLOCK slots of one (row, KV head) of one layer: one page if there are bounds.

    A row of `table` holds the layer's addresses: bias, positions, clock, keys, key_scales, minima and maxima; behind
    them, its number of slots.
    """
    layer, row, block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    entry = table + layer * (COLUMNS + 1)
    bias = tl.load(entry).to(tl.pointer_type(BIAS))
    positions = tl.load(entry + 1).to(tl.pointer_type(tl.int32))
    clock = tl.load(entry + 2).to(tl.pointer_type(tl.int64))
    slots = tl.load(entry + COLUMNS)
    lane = block * BLOCK + tl.arange(0, BLOCK)
    inside = lane < slots
    slot = row * slots + lane

    # 1. A slot holds a token if its position has been reached.
    position = tl.load(positions + slot, mask=inside, other=-1)
    told = (position >= 0) & (position <= tl.load(clock + row * 2)) & (position < length)
    # 2. The mask says, by position, whether it may be read.
    shown = tl.load(visible + (row // heads) * length + position, mask=told, other=0)
    before = tl.load(bias + slot, mask=inside, other=float("-inf"))
    after = tl.where(told, tl.where(shown > 0, 0.0, float("-inf")), before)
    tl.store(bias + slot, after, mask=inside)

    # 3. A page whose visible tokens have changed gets new bounds.
    if BOUNDS:
        changed = tl.max((before != after).to(tl.int32), 0)
        if changed > 0:
            keys = tl.load(entry + 3).to(tl.pointer_type(KEY))
            minima = tl.load(entry + 5).to(tl.pointer_type(BOUND))
            maxima = tl.load(entry + 6).to(tl.pointer_type(BOUND))
            dk = tl.arange(0, BLOCK_DK)
            held = inside[:, None] & (dk[None, :] < DK)
            key = tl.load(keys + slot[:, None] * DK + dk[None, :], mask=held, other=0.0).to(tl.float32)
            if QUANTIZED:
                scales = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
                key *= tl.load(scales + slot, mask=inside, other=0.0)[:, None]
            is_read = (after == 0.0)[:, None]
            low = tl.min(tl.where(is_read, key, float("inf")), 0)
            high = tl.max(tl.where(is_read, key, float("-inf")), 0)
            page = (row * (slots // BLOCK) + block) * DK + dk
            tl.store(minima + page, low.to(BOUND), mask=dk < DK)
            tl.store(maxima + page, high.to(BOUND), mask=dk < DK)


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, {torch.float8_e4m3fn: "float8e4nv"}.get(dtype, str(dtype).removeprefix("torch.")))


def show(layers: Sequence[Held], visible: Tensor) -> None:
    """See `visibility.show`."""
    groups: dict[tuple[object, ...], list[Held]] = {}
    for held in layers:
        bounds = held.minima
        shape = (held.bias.shape[:2], held.keys.shape[-1], held.page_size, held.keys.dtype, bounds is None)
        groups.setdefault(shape, []).append(held)
    for group in groups.values():
        _launch(group, visible.contiguous())


def _launch(layers: list[Held], visible: Tensor) -> None:
    first = layers[0]
    batch, heads, _ = first.bias.shape
    has_bounds, dk = first.minima is not None, first.keys.shape[-1]
    block = first.page_size if has_bounds else BLOCK_SLOTS
    most_slots = max(held.bias.shape[2] for held in layers)
    show_kernel[(len(layers), batch * heads, triton.cdiv(most_slots, block))](
        _table(layers), visible.view(torch.uint8), heads, visible.shape[1],
        COLUMNS=COLUMNS, BIAS=_triton_dtype(first.bias.dtype), KEY=_triton_dtype(first.keys.dtype),
        BOUND=_triton_dtype(first.bias.dtype if first.minima is None else first.minima.dtype),
        BOUNDS=has_bounds, QUANTIZED=first.key_scales is not None, DK=dk, BLOCK=block,
        BLOCK_DK=triton.next_power_of_2(dk),
    )  # fmt: skip


def _table(layers: list[Held]) -> Tensor:
    """The layers' addresses on their device; copied there only when one of them has changed."""
    device = layers[0].bias.device
    entries: list[int] = [-1 if device.index is None else device.index]
    for held in layers:
        tensors = held.bias, held.positions, held.clock, held.keys, held.key_scales, held.minima, held.maxima
        entries += [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        entries.append(held.bias.shape[2])
    key = tuple(entries)
    if key not in _TABLES:
        if len(_TABLES) >= MAX_TABLES:
            _TABLES.clear()
        _TABLES[key] = torch.tensor(entries[1:], dtype=torch.int64).to(device, non_blocking=True)
    return _TABLES[key]
