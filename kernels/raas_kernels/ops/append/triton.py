"""Append in Triton: one program writes the token of one (row, KV head), without a host synchronisation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...paged_kv import PagedKV, finite
from ...quantize import quantize


MAX_BLOCK_PAGES = 1024  # pages whose priorities a program compares at once


@triton.jit
def finite_states(states, shown):
    """0 for a NaN or an infinity of a hidden token, because its weight 0 * NaN would be NaN."""
    wide = states.to(tl.float32)
    return tl.where((shown > 0) | (wide - wide == 0.0), states, 0.0)  # only for finite x is x - x == 0


@triton.jit
def coded(states, low, high):
    """4-bit codes of float32 `states` between the bounds `low` and `high`, see `pack`."""
    step = (high - low) * (1.0 / 15)
    below = states - low
    # div_rn rounds as torch does; it takes two tensors of one shape.
    codes = tl.floor(tl.div_rn(below, tl.where(step > 0, step, 1.0) + tl.zeros_like(below)) + 0.5)
    return tl.minimum(tl.maximum(codes, 0.0), 15.0).to(tl.uint8)


@triton.jit
def code_channels(open_keys, key_min, key_max, ignored, lane, channel, DK: tl.constexpr):
    """The codes [PAGE, BLOCK_DK // 2] of one half of the channels of the open page; it writes their bounds."""
    inside = channel < DK // 2
    address = lane[:, None] * DK + channel[None, :]
    key = tl.load(open_keys + address, mask=inside[None, :], other=0.0).to(tl.float32)
    low = tl.min(tl.where(ignored[:, None], float("inf"), key), 0)
    high = tl.max(tl.where(ignored[:, None], float("-inf"), key), 0)
    tl.store(key_min + channel, low.to(key_min.dtype.element_ty), mask=inside)
    tl.store(key_max + channel, high.to(key_max.dtype.element_ty), mask=inside)
    return coded(key, low[None, :], high[None, :])


@triton.jit
def append_kernel(
    keys, values, bias, positions, priority, evictable, open_slot, clock, key_scales, value_scales, key_min, key_max,
    states, open_keys, value_min, value_max, key, value, key_scale, value_scale, visible, rows, blocks,
    heads, pages, keys_row, keys_head, keys_slot, values_row, values_head, values_slot,
    key_row, key_head, value_row, value_head,
    PAGE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, STATES: tl.constexpr,
    BOUNDS: tl.constexpr, QUANTIZED: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, MAY_CLOSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_STATES: tl.constexpr,
):  # fmt: skip
    """Program i serves KV head i % heads of the call's row i // heads, which is row `rows[i // heads]` of the cache.

    `blocks` is None, and then not even an argument of the compiled kernel, where each row has memory of its own.
    """
    call = tl.program_id(0).to(tl.int64)
    call_row, head = call // heads, call % heads
    row = tl.load(rows + call_row) if ROWS else call_row
    pair = row * heads + head  # index of the (row, KV head) in the buffers

    # 1. Advance the clock.
    now = tl.load(clock + pair * 2) + 1
    decoded = tl.load(clock + pair * 2 + 1) + 1
    tl.debug_barrier()  # no warp may read the clock after another has advanced it
    tl.store(clock + pair * 2, now)
    tl.store(clock + pair * 2 + 1, decoded)
    offset = decoded % PAGE
    opening = offset == 0

    # 2. If the open page is full, recycle the evictable page of the smallest (priority, first position).
    start = tl.load(open_slot + pair)
    lane = tl.arange(0, PAGE)
    if opening:
        lowest = tl.full([], float("inf"), tl.float64)
        oldest = tl.full([], 0x7FFFFFFF, tl.int32)
        victim = tl.full([], 0, tl.int32)
        for block in range(0, pages, BLOCK_PAGES):
            page = block + tl.arange(0, BLOCK_PAGES)
            exists = page < pages
            may_go = tl.load(evictable + row * pages + page, mask=exists, other=0).to(tl.int32) > 0
            rank = tl.load(priority + pair * pages + page, mask=may_go, other=float("inf"))
            first = tl.load(positions + (pair * pages + page) * PAGE, mask=may_go, other=0x7FFFFFFF)
            block_lowest = tl.min(rank, 0)
            first = tl.where(may_go & (rank == block_lowest), first, 0x7FFFFFFF)
            block_oldest = tl.min(first, 0)
            is_before = (block_lowest < lowest) | ((block_lowest == lowest) & (block_oldest < oldest))
            victim = tl.where(is_before, block + tl.argmin(first, 0), victim)
            oldest = tl.where(is_before, block_oldest, oldest)
            lowest = tl.where(is_before, block_lowest, lowest)
        tl.debug_barrier()  # no warp may compare priorities and positions after another has written them
        start = victim.to(tl.int64) * PAGE
        tl.store(open_slot + pair, start)
        tl.store(positions + pair * pages * PAGE + start + lane, (now + lane).to(tl.int32))
        if STATES > 0:
            number = tl.arange(0, BLOCK_STATES)
            zeros = tl.zeros([BLOCK_STATES], tl.float64)
            tl.store(states + (pair * pages + victim) * STATES + number, zeros, mask=number < STATES)
    page = start // PAGE

    # 3. The bias: the token's own slot, and with an opening page (offset 0) the page's other slots, which are empty.
    shown = tl.load(visible + call_row).to(tl.int32) if MASKED else 1
    tl.store(
        bias + pair * pages * PAGE + start + lane,
        tl.where(lane == offset, tl.where(shown > 0, 0.0, float("-inf")), float("-inf")),
        mask=(lane == offset) | (lane >= offset * PAGE),
    )

    # 4. The open page's priority becomes the present.
    if opening | (offset == PAGE - 1) | MAY_CLOSE:
        tl.store(priority + pair * pages + page, now.to(tl.float64))

    # 5. Where the contents of the open page are: from slot `begin` of the row on, or in a block.
    dk, dv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    half = tl.arange(0, BLOCK_DV // 2)
    channel = tl.arange(0, BLOCK_DK // 2)
    is_key, is_value, is_half, is_channel = dk < DK, dv < DV, half < DV // 2, channel < DK // 2
    place, begin, width, has_memory = row, start, pages, None
    if blocks is not None:
        place = tl.load(blocks + row * pages + page).to(tl.int64)
        begin, width, has_memory = 0, 1, place > 0
        key_size, value_size = tl.where(has_memory, DK, 0), tl.where(has_memory, DV, 0)
        is_key, is_value, is_half, is_channel = (
            dk < key_size,
            dv < value_size,
            half < value_size // 2,
            channel < key_size // 2,
        )
    slot = begin + offset
    held = (place * heads + head) * width * PAGE + slot

    # 6. Keys and values, [DK] and [DV], and for codes their scales.
    new_key = tl.load(key + call_row * key_row + head * key_head + dk, mask=dk < DK, other=0.0)
    new_value = tl.load(value + call_row * value_row + head * value_head + dv, mask=dv < DV, other=0.0)
    wide = new_key.to(tl.float32)
    if MASKED and not QUANTIZED:
        new_key, new_value = finite_states(new_key, shown), finite_states(new_value, shown)
        wide = new_key.to(tl.float32)
    if QUANTIZED:
        new_scale = tl.load(key_scale + call)
        wide *= new_scale
        tl.store(key_scales + held, new_scale, mask=has_memory)
        tl.store(value_scales + held, tl.load(value_scale + call), mask=has_memory)
    keys += place * keys_row + head * keys_head
    values += place * values_row + head * values_head + slot * values_slot
    if PACKED:
        open_keys += pair * PAGE * DK
        tl.store(open_keys + offset * DK + dk, new_key, mask=dk < DK)
        source = value + call_row * value_row + head * value_head + half
        first = tl.load(source, mask=half < DV // 2, other=0.0)
        second = tl.load(source + DV // 2, mask=half < DV // 2, other=0.0)
        if MASKED:
            first, second = finite_states(first, shown), finite_states(second, shown)
        first, second = first.to(tl.float32), second.to(tl.float32)
        wide_value = new_value.to(tl.float32)
        least = tl.min(tl.where(dv < DV, wide_value, float("inf")), 0)
        most = tl.max(tl.where(dv < DV, wide_value, float("-inf")), 0)
        tl.store(values + half, coded(first, least, most) | (coded(second, least, most) << 4), mask=is_half)
        tl.store(value_min + held, least.to(value_min.dtype.element_ty), mask=has_memory)
        tl.store(value_max + held, most.to(value_max.dtype.element_ty), mask=has_memory)
    else:
        tl.store(keys + slot * keys_slot + dk, new_key, mask=is_key)
        tl.store(values + dv, new_value, mask=is_value)

    # 7. Widen the page's key_min and key_max by a visible key.
    if BOUNDS:
        extreme = (pair * pages + page) * DK + dk
        low = tl.load(key_min + extreme, mask=dk < DK).to(tl.float32)
        high = tl.load(key_max + extreme, mask=dk < DK).to(tl.float32)
        lowest_key = tl.where(shown > 0, wide, float("inf"))
        highest_key = tl.where(shown > 0, wide, float("-inf"))
        low = tl.where(opening, lowest_key, tl.minimum(low, lowest_key))
        high = tl.where(opening, highest_key, tl.maximum(high, highest_key))
        tl.store(key_min + extreme, low.to(key_min.dtype.element_ty), mask=dk < DK)
        tl.store(key_max + extreme, high.to(key_max.dtype.element_ty), mask=dk < DK)

    # 8. In a 4-bit cache, code the keys of a page that is full, each channel between its own bounds.
    if PACKED:  # noqa: SIM102  # only this `if` is decided when the kernel is compiled
        if offset == PAGE - 1:
            tl.debug_barrier()  # other warps have written a part of the last key, and the page's bounds
            is_visible = tl.load(bias + pair * pages * PAGE + start + lane) == 0.0
            ignored = (is_visible == 0) & (tl.max(is_visible.to(tl.int32), 0) > 0)
            page_bounds = (pair * pages + page) * DK
            low_codes = code_channels(
                open_keys, key_min + page_bounds, key_max + page_bounds, ignored, lane, channel, DK
            )
            page_bounds += DK // 2
            high_codes = code_channels(
                open_keys + DK // 2, key_min + page_bounds, key_max + page_bounds, ignored, lane, channel, DK
            )
            tl.store(
                keys + (begin + lane)[:, None] * keys_slot + channel[None, :], low_codes | (high_codes << 4),
                mask=is_channel[None, :],
            )  # fmt: skip


def append(
    kv: PagedKV,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None = None,
    rows: Tensor | None = None,
    may_close: bool = False,
) -> None:
    """See `raas_kernels.append`."""
    # 1. Codes and scales of the new token, [R, H, 1, D] and [R, H, 1].
    is_quantized, unused = kv.key_scales is not None, kv.bias
    key_scale = value_scale = unused
    if is_quantized:
        if visible is not None:
            key, value = (finite(new, ~visible[:, None, None, None]) for new in (key, value))
        (key, key_scale), (value, value_scale) = quantize(key, kv.keys.dtype), quantize(value, kv.values.dtype)
    key, value = (new if new.stride(-1) == 1 else new.contiguous() for new in (key, value))

    # 2. One program for each (row, KV head).
    heads, dk, dv = key.shape[1], key.shape[-1], value.shape[-1]
    states = 0 if kv.states is None else kv.states.shape[-1]
    append_kernel[(key.shape[0] * heads,)](
        kv.keys, kv.values, kv.bias, kv.positions, kv.priority, kv.evictable, kv.open_slot, kv.clock,
        *(unused if buffer is None else buffer
          for buffer in (kv.key_scales, kv.value_scales, kv.key_min, kv.key_max, kv.states, kv.open_keys, kv.value_min,
                         kv.value_max)),
        key, value, key_scale, value_scale,
        unused if visible is None else visible.contiguous(), unused if rows is None else rows.contiguous(),
        kv.blocks, heads, kv.num_pages, *kv.keys.stride()[:3], *kv.values.stride()[:3], *key.stride()[:2],
        *value.stride()[:2],
        PAGE=kv.page_size, DK=dk, DV=dv, STATES=states, BOUNDS=kv.key_min is not None, QUANTIZED=is_quantized,
        PACKED=kv.is_packed, MASKED=visible is not None, MAY_CLOSE=may_close, ROWS=rows is not None,
        BLOCK_PAGES=min(MAX_BLOCK_PAGES, triton.next_power_of_2(kv.num_pages)),
        BLOCK_DK=triton.next_power_of_2(dk), BLOCK_DV=triton.next_power_of_2(dv),
        BLOCK_STATES=triton.next_power_of_2(max(states, 1)),
    )  # fmt: skip
