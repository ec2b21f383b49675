"""Attend in Triton: one kernel, or slices of the slots that a second kernel joins, without a host synchronisation.

All query heads of a group share one read of a page.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...paged_kv import PagedKV
from .configs import MIN_DOT, Config, choose_config
from .reference import Reduction


@triton.jit
def capped(logits, softcap):
    """softcap * tanh(logits / softcap), with tanh as an exponential that cannot overflow."""
    decay = tl.exp(-2.0 * tl.abs(logits) / softcap)
    size = softcap * (1.0 - decay) / (1.0 + decay)
    return tl.where(logits < 0, -size, size)


@triton.jit
def store_scores(
    unit_logit, scores, call, block, pages, total_max, inverse, group, in_group,
    SUM: tl.constexpr, MEAN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_PAGES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Write the scores of one block of a (row, KV head)'s pages.

    `unit_logit` holds each unit's largest logit, `total_max` and `inverse` the softmax's maximum and 1 / its sum, both
    [BLOCK_GROUP].
    """
    page = block * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    weight = tl.zeros([BLOCK_GROUP, BLOCK_PAGES], tl.float32)
    for i in range(UNITS):
        unit = (call * GROUP + group[:, None]) * pages * UNITS + page[None, :] * UNITS + i
        here = tl.load(unit_logit + unit, mask=in_group[:, None] & (page[None, :] < pages), other=float("-inf"))
        here = tl.exp(here - total_max[:, None]) * inverse[:, None]
        weight = weight + here if SUM else tl.maximum(weight, here)
    score = tl.sum(weight, 0) / GROUP if MEAN else tl.max(weight, 0)
    tl.store(scores + call * pages + page, score, mask=page < pages)


@triton.jit
def unpacked(codes, low, high):
    """The float32 numbers that 4-bit `codes` between the bounds `low` and `high` stand for, see `unpack`."""
    return low + codes.to(tl.float32) * ((high - low) * (1.0 / 15))


@triton.jit
def channels_of(codes, key_min, key_max, open_keys, bounds, exact, is_open, mask):
    """A tile of one half of the channels of keys, float32: from `codes`, in the open page from `open_keys`.

    `bounds` and `exact` are the offsets of the tile's numbers in `key_min` and in `open_keys`.
    """
    low = tl.load(key_min + bounds, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(key_max + bounds, mask=mask, other=0.0).to(tl.float32)
    opened = tl.load(open_keys + exact, mask=mask & is_open[:, None], other=0.0).to(tl.float32)
    return tl.where(is_open[:, None], opened, unpacked(codes, low, high))


@triton.jit
def attend_kernel(
    query, keys, values, bias, selected, key_scales, value_scales, key_min, key_max, open_keys, open_slot, clock,
    value_min, value_max, sinks, rows, blocks, scale, softcap,
    part_output, part_max, part_sum, unit_logit, output, scores,
    heads, slots, slots_per_slice, cache_slots, keys_row, keys_head, values_row, values_head, bias_row, bias_head,
    KEYS_SLOT: tl.constexpr, VALUES_SLOT: tl.constexpr,
    CAPPED: tl.constexpr, SELECTED: tl.constexpr, QUANTIZED: tl.constexpr, PACKED: tl.constexpr,
    SINKS: tl.constexpr, ROWS: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr, WHOLE: tl.constexpr,
    GROUP: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_PAGES: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Online softmax over one slice of the slots that one (row, KV head) reads; with WHOLE, over all of them.

    Program (i, slice) serves KV head i % heads of the call's row i // heads, which is row `rows[i // heads]` of the
    cache. For each query head and each unit of UNIT slots (a page, or a tile if that is smaller) it keeps the largest
    logit; with SUM, the logarithm of the sum of exponentials.

    With PACKED, keys and values are 4-bit codes: a byte has one code of the first half of the dimensions and one of the
    second, so that each half has a dot product of its own. BLOCK_DK and BLOCK_DV are then blocks of a half.

    `blocks` is None, and then not even an argument of the compiled kernel, where each row has memory of its own.
    """
    call = tl.program_id(0).to(tl.int64)
    slice_id = tl.program_id(1)
    slices = tl.num_programs(1)
    call_row, head = call // heads, call % heads
    row = tl.load(rows + call_row) if ROWS else call_row
    group = tl.arange(0, BLOCK_GROUP)
    dk = tl.arange(0, BLOCK_DK)
    dv = tl.arange(0, BLOCK_DV)
    lane = tl.arange(0, BLOCK_SLOTS)
    in_group = group < GROUP
    if blocks is None:
        keys += row * keys_row + head * keys_head
        values += row * values_row + head * values_head
    else:  # step 2 adds what depends on the block
        keys += head * keys_head
        values += head * values_head
        blocks += row * (cache_slots // PAGE)
    bias += row * bias_row + head * bias_head
    held = (row * heads + head) * cache_slots if blocks is None else head * PAGE
    if QUANTIZED:
        key_scales += held
        value_scales += held
    KEY_PART: tl.constexpr = DK // 2 if PACKED else DK
    VALUE_PART: tl.constexpr = DV // 2 if PACKED else DV
    if PACKED:
        pair = row * heads + head
        key_min += pair * (cache_slots // PAGE) * DK
        key_max += pair * (cache_slots // PAGE) * DK
        open_keys += pair * PAGE * DK
        value_min += held
        value_max += held
        is_full = (tl.load(clock + pair * 2 + 1) + 1) % PAGE == 0
        open_begin = tl.where(is_full, -PAGE, tl.load(open_slot + pair))  # no slot is in a page before 0

    # 1. The queries of the group, [BLOCK_GROUP, BLOCK_DK].
    q_address = query + (call * GROUP + group[:, None]) * DK + dk[None, :]
    q_mask = in_group[:, None] & (dk[None, :] < KEY_PART)
    q = tl.load(q_address, mask=q_mask, other=0.0).to(OPERAND)
    if PACKED:
        q_second = tl.load(q_address + KEY_PART, mask=q_mask, other=0.0).to(OPERAND)
        summed_second = tl.zeros([BLOCK_GROUP, BLOCK_DV], tl.float32)
    running_max = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_GROUP], tl.float32)
    summed = tl.zeros([BLOCK_GROUP, BLOCK_DV], tl.float32)

    begin = slice_id * slots_per_slice
    end = tl.minimum(begin + slots_per_slice, slots)
    for start in range(begin, end, BLOCK_SLOTS):
        # 2. Where the tile's slots are in the cache.
        slot = start + lane
        inside = slot < end
        if SELECTED:
            page = tl.load(selected + call * (slots // PAGE) + slot // PAGE, mask=inside, other=-1)
            stored = page * PAGE + slot % PAGE
            is_read = inside & (page >= 0)
        else:
            stored = slot.to(tl.int64)
            is_read = inside
        key_at, value_at, one_at = stored * KEYS_SLOT, stored * VALUES_SLOT, stored  # offsets of K, V, one number
        hidden = tl.load(bias + stored, mask=is_read, other=float("-inf"))
        if blocks is not None:
            block = tl.load(blocks + stored // PAGE, mask=is_read, other=0).to(tl.int64)
            in_block = stored % PAGE
            key_at = block * keys_row + in_block * KEYS_SLOT
            value_at = block * values_row + in_block * VALUES_SLOT
            one_at = block * heads * PAGE + in_block
            is_read = block > 0

        # 3. Logits, [BLOCK_GROUP, BLOCK_SLOTS]; -inf where there is no visible token.
        k_mask = is_read[:, None] & (dk[None, :] < KEY_PART)
        k = tl.load(keys + key_at[:, None] + dk[None, :], mask=k_mask, other=0.0)
        if PACKED:
            lane_of_open = stored - open_begin
            is_open = (lane_of_open >= 0) & (lane_of_open < PAGE)
            bounds = (stored // PAGE)[:, None] * DK + dk[None, :]
            exact = lane_of_open[:, None] * DK + dk[None, :]
            k_second = channels_of(
                k >> 4, key_min + KEY_PART, key_max + KEY_PART, open_keys + KEY_PART, bounds, exact, is_open, k_mask
            ).to(OPERAND)
            k = channels_of(k & 15, key_min, key_max, open_keys, bounds, exact, is_open, k_mask).to(OPERAND)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
            logits = (logits + tl.dot(q_second, tl.trans(k_second), input_precision="ieee")) * scale
        else:
            logits = tl.dot(q, tl.trans(k.to(OPERAND)), input_precision="ieee") * scale
        if QUANTIZED:
            logits *= tl.load(key_scales + one_at, mask=is_read, other=0.0)[None, :]
        if CAPPED:
            logits = capped(logits, softcap)
        logits += hidden[None, :]

        # 4. Keep one number of each unit for the scores.
        by_unit = tl.reshape(logits, [BLOCK_GROUP, BLOCK_SLOTS // UNIT, UNIT])
        kept = tl.max(by_unit, 2)
        if SUM:
            finite = tl.where(kept == float("-inf"), 0.0, kept)
            # The largest logit gives exp(0) = 1: only a unit without a visible token has a sum below 1.
            total = tl.sum(tl.exp(by_unit - finite[:, :, None]), 2)
            kept += tl.log(tl.maximum(total, 1.0))
        unit = start // UNIT + tl.arange(0, BLOCK_SLOTS // UNIT)
        tl.store(
            unit_logit + (call * GROUP + group[:, None]) * (slots // UNIT) + unit[None, :],
            kept, mask=in_group[:, None] & (unit[None, :] < end // UNIT),
        )  # fmt: skip

        # 5. Add the tile to the running softmax.
        new_max = tl.maximum(running_max, tl.max(logits, 1))
        # While no token was visible the maximum is -inf: keep -inf - -inf out of the exponent.
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp(logits - anchor[:, None])
        rescale = tl.exp(running_max - anchor)
        v = tl.load(
            values + value_at[:, None] + dv[None, :],
            mask=is_read[:, None] & (dv[None, :] < VALUE_PART), other=0.0,
        )  # fmt: skip
        running_sum = running_sum * rescale + tl.sum(weights, 1)
        if QUANTIZED:
            weights *= tl.load(value_scales + one_at, mask=is_read, other=0.0)[None, :]
        if PACKED:
            low = tl.load(value_min + one_at, mask=is_read, other=0.0).to(tl.float32)[:, None]
            high = tl.load(value_max + one_at, mask=is_read, other=0.0).to(tl.float32)[:, None]
            v_second = unpacked(v >> 4, low, high).to(OPERAND)
            summed_second = summed_second * rescale[:, None]
            summed_second += tl.dot(weights.to(OPERAND), v_second, input_precision="ieee")
            v = unpacked(v & 15, low, high)
        summed = summed * rescale[:, None] + tl.dot(weights.to(OPERAND), v.to(OPERAND), input_precision="ieee")
        running_max = new_max

    # 6. Output and scores, or what the slices are joined from.
    inside_output = in_group[:, None] & (dv[None, :] < VALUE_PART)
    if WHOLE:
        total_max = running_max
        if SINKS:
            sink = tl.load(sinks + (call % heads) * GROUP + group, mask=in_group, other=float("-inf")).to(tl.float32)
            total_max = tl.maximum(total_max, sink)
        total_max = tl.where(in_group, total_max, 0.0)
        rescale = tl.exp(running_max - total_max)
        total_sum = running_sum * rescale
        if SINKS:
            total_sum += tl.exp(sink - total_max)
        inverse = 1.0 / tl.where(in_group, total_sum, 1.0)
        output += (call * GROUP + group[:, None]) * DV + dv[None, :]
        factor = (rescale * inverse)[:, None]
        tl.store(output, (summed * factor).to(output.dtype.element_ty), mask=inside_output)
        if PACKED:
            second = (summed_second * factor).to(output.dtype.element_ty)
            tl.store(output + VALUE_PART, second, mask=inside_output)
        tl.debug_barrier()  # other threads have stored some of the logits
        for block in range(tl.cdiv(slots // PAGE, BLOCK_PAGES)):
            store_scores(
                unit_logit, scores, call, block, slots // PAGE, total_max, inverse, group, in_group,
                SUM, MEAN, GROUP, BLOCK_GROUP, BLOCK_PAGES, PAGE // UNIT,
            )  # fmt: skip
    else:
        part = (call * slices + slice_id) * GROUP + group
        tl.store(part_max + part, running_max, mask=in_group)
        tl.store(part_sum + part, running_sum, mask=in_group)
        part_output += part[:, None] * DV + dv[None, :]
        tl.store(part_output, summed, mask=inside_output)
        if PACKED:
            tl.store(part_output + VALUE_PART, summed_second, mask=inside_output)


@triton.jit
def reduce_kernel(
    part_output, part_max, part_sum, unit_logit, sinks, output, scores, pages, slices, heads,
    SINKS: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_PAGES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Joins the slices of one (row, KV head): program (i, 0) writes its output, (i, block) the scores of a block."""
    call = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    group = tl.arange(0, BLOCK_GROUP)
    in_group = group < GROUP
    part = call * slices * GROUP + group

    # 1. The maximum and the sum of the softmax over all slices, [BLOCK_GROUP].
    total_max = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    for i in range(slices):
        total_max = tl.maximum(total_max, tl.load(part_max + part + i * GROUP, mask=in_group, other=float("-inf")))
    if SINKS:
        sink = tl.load(sinks + (call % heads) * GROUP + group, mask=in_group, other=float("-inf")).to(tl.float32)
        total_max = tl.maximum(total_max, sink)
    total_max = tl.where(in_group, total_max, 0.0)
    total_sum = tl.zeros([BLOCK_GROUP], tl.float32)
    if SINKS:
        total_sum += tl.exp(sink - total_max)
    for i in range(slices):
        slice_max = tl.load(part_max + part + i * GROUP, mask=in_group, other=float("-inf"))
        slice_sum = tl.load(part_sum + part + i * GROUP, mask=in_group, other=0.0)
        total_sum += slice_sum * tl.exp(slice_max - total_max)
    inverse = 1.0 / tl.where(in_group, total_sum, 1.0)

    # 2. The output.
    if block == 0:
        dv = tl.arange(0, BLOCK_DV)
        inside = in_group[:, None] & (dv[None, :] < DV)
        joined = tl.zeros([BLOCK_GROUP, BLOCK_DV], tl.float32)
        for i in range(slices):
            slice_max = tl.load(part_max + part + i * GROUP, mask=in_group, other=float("-inf"))
            slice_output = tl.load(part_output + (part + i * GROUP)[:, None] * DV + dv[None, :], mask=inside, other=0.0)
            joined += slice_output * tl.exp(slice_max - total_max)[:, None]
        tl.store(
            output + (call * GROUP + group[:, None]) * DV + dv[None, :],
            (joined * inverse[:, None]).to(output.dtype.element_ty), mask=inside,
        )  # fmt: skip

    # 3. The scores.
    store_scores(
        unit_logit, scores, call, block, pages, total_max, inverse, group, in_group,
        SUM, MEAN, GROUP, BLOCK_GROUP, BLOCK_PAGES, UNITS,
    )  # fmt: skip


def _dot_operand(dtype: torch.dtype) -> tl.dtype:
    """The dtype `tl.dot` multiplies: the query's; float32 in the interpreter, which takes bfloat16 for integers."""
    operands = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    if dtype not in operands:
        raise TypeError(f"The Triton kernels take float16, bfloat16 or float32, not {dtype}: set RAAS_KERNELS=torch.")
    return tl.float32 if triton.knobs.runtime.interpret else operands[dtype]


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def attend(
    kv: PagedKV,
    query: Tensor,
    scale: float,
    *,
    selected: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    page_score: Reduction = "max",
    group_score: Reduction = "max",
    rows: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """See `raas_kernels.attend`.

    Args:
        config: how to launch; None takes what was measured for the shape.
    """
    # 1. How the slots of each (row, KV head) are sliced.
    batch, heads, group = query.shape[0], kv.keys.shape[1], query.shape[1] // kv.keys.shape[1]
    dk, dv, pairs = query.shape[-1], kv.value_size, batch * heads
    pages = kv.num_pages if selected is None else selected.shape[-1]
    slots = pages * kv.page_size
    if config is None:
        shape = pairs, slots, max(dk, dv), query.element_size()
        config = choose_config(_capability(query.device), *shape, kv.is_packed)
    tile = config.tile
    unit = min(kv.page_size, tile)
    slices = max(1, min(config.programs // pairs, triton.cdiv(slots, tile)))
    slots_per_slice = triton.cdiv(triton.cdiv(slots, slices), tile) * tile
    slices = triton.cdiv(slots, slots_per_slice)
    is_whole = slices == 1

    # 2. Results, and what the slices are joined from.
    scratch: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    unit_logit = torch.empty(pairs, group, slots // unit, **scratch)
    output = torch.empty(batch, heads * group, 1, dv, dtype=query.dtype, device=query.device)
    scores = torch.empty(batch, heads, pages, **scratch)
    part_output = part_max = part_sum = scores
    if not is_whole:
        part_output = torch.empty(pairs, slices, group, dv, **scratch)
        part_max, part_sum = (torch.empty(pairs, slices, group, **scratch) for _ in range(2))

    # 3. Attention of the slices, then their join. An argument that no kernel reads gets any tensor.
    keys, values = (states if states.stride(-1) == 1 else states.contiguous() for states in (kv.keys, kv.values))
    bias = kv.bias
    block_pages = min(128, triton.next_power_of_2(pages))
    options = {
        "SINKS": sinks is not None, "SUM": page_score == "sum", "MEAN": group_score == "mean", "GROUP": group, "DV": dv,
        "BLOCK_GROUP": max(MIN_DOT, triton.next_power_of_2(group)), "BLOCK_PAGES": block_pages,
    }  # fmt: skip
    key_part, value_part = (dk // 2, dv // 2) if kv.is_packed else (dk, dv)
    sinks = output if sinks is None else sinks
    attend_kernel[(pairs, slices)](
        query.contiguous(), keys, values, bias, bias if selected is None else selected.contiguous(),
        *(bias if buffer is None else buffer
          for buffer in (kv.key_scales, kv.value_scales, kv.key_min, kv.key_max, kv.open_keys)),
        kv.open_slot, kv.clock, *(bias if buffer is None else buffer for buffer in (kv.value_min, kv.value_max)), sinks,
        bias if rows is None else rows.contiguous(), kv.blocks, scale, 1.0 if softcap is None else softcap,
        part_output, part_max, part_sum, unit_logit, output, scores,
        heads, slots, slots_per_slice, kv.bias.shape[2],
        *keys.stride()[:2], *values.stride()[:2], *bias.stride()[:2],
        KEYS_SLOT=keys.stride(2), VALUES_SLOT=values.stride(2),  # constants, because the inner loop multiplies by them
        CAPPED=softcap is not None, SELECTED=selected is not None, QUANTIZED=kv.key_scales is not None,
        PACKED=kv.is_packed, ROWS=rows is not None, WHOLE=is_whole, PAGE=kv.page_size, UNIT=unit, DK=dk,
        BLOCK_SLOTS=tile, BLOCK_DK=max(MIN_DOT, triton.next_power_of_2(key_part)),
        BLOCK_DV=max(MIN_DOT, triton.next_power_of_2(value_part)), OPERAND=_dot_operand(query.dtype),
        num_warps=config.warps, num_stages=config.stages, **options,
    )  # fmt: skip
    if not is_whole:
        reduce_kernel[(pairs, triton.cdiv(pages, block_pages))](
            part_output, part_max, part_sum, unit_logit, sinks, output, scores, pages, slices, heads,
            UNITS=kv.page_size // unit, BLOCK_DV=triton.next_power_of_2(dv), **options,
        )  # fmt: skip
    return output, scores
