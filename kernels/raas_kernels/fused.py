"""The four paged operations in Triton, with the signatures of `reference.py`, without a host synchronisation.

One program serves one (row, KV head), or one slice of its pages: all query heads of a group share one read of a page.
In order: append, attend (in one kernel, or in slices that `reduce_kernel` joins), page bounds, stamp; each kernel
before its launcher. What a launcher takes and gives is fixed by `reference.py`, how a kernel goes about it is not.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import MIN_DOT, Config, choose_config
from .reference import Reduction, Scales, finite, quantize


@triton.jit
def capped(logits, softcap):
    """softcap * tanh(logits / softcap), tanh by an exponential that cannot overflow."""
    decay = tl.exp(-2.0 * tl.abs(logits) / softcap)
    size = softcap * (1.0 - decay) / (1.0 + decay)
    return tl.where(logits < 0, -size, size)


@triton.jit
def append_kernel(
    keys, values, bias, positions, priority, open_slot, clock, key, value, minima, maxima,
    key_scales, value_scales, key_scale, value_scale, visible,
    heads, pages, decode_pages, stride_key, stride_value,
    PAGE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BOUNDS: tl.constexpr, QUANTIZED: tl.constexpr, PADDED: tl.constexpr, MAY_CLOSE: tl.constexpr,
    BLOCK_PAGES: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    now = tl.load(clock + row * 2) + 1
    decoded = tl.load(clock + row * 2 + 1) + 1
    # No warp may read the clock after another has moved it on.
    tl.debug_barrier()
    tl.store(clock + row * 2, now)
    tl.store(clock + row * 2 + 1, decoded)
    offset = decoded % PAGE
    opening = offset == 0
    first_decode_page = pages - decode_pages
    lane = tl.arange(0, PAGE)

    start = tl.load(open_slot + row)
    if opening:
        candidate = tl.arange(0, BLOCK_PAGES)
        exists = candidate < decode_pages
        rank = tl.load(priority + row * decode_pages + candidate, mask=exists, other=float("inf"))
        first = tl.load(positions + (row * pages + first_decode_page + candidate) * PAGE, mask=exists, other=0x7FFFFFFF)
        oldest = (rank == tl.min(rank, 0)) & exists
        victim = tl.argmin(tl.where(oldest, first, 0x7FFFFFFF), 0)
        start = (first_decode_page + victim).to(tl.int64) * PAGE
        tl.store(open_slot + row, start)
        tl.store(positions + row * pages * PAGE + start + lane, (now + lane).to(tl.int32))
    shown = tl.load(visible + row // heads).to(tl.int32) if PADDED else 1
    # An opening page (offset 0) is wiped in the same store: its mask is all lanes, otherwise one.
    tl.store(
        bias + row * pages * PAGE + start + lane,
        tl.where(lane == offset, tl.where(shown > 0, 0.0, float("-inf")), float("-inf")),
        mask=(lane == offset) | (lane >= offset * PAGE),
    )
    page = start // PAGE
    if opening | (offset == PAGE - 1) | MAY_CLOSE:
        tl.store(priority + row * decode_pages + page - first_decode_page, now.to(tl.float64))

    slot = row * pages * PAGE + start + offset
    dk = tl.arange(0, BLOCK_DK)
    new_key = tl.load(key + row * stride_key + dk, mask=dk < DK, other=0.0)
    dv = tl.arange(0, BLOCK_DV)
    new_value = tl.load(value + row * stride_value + dv, mask=dv < DV, other=0.0)
    wide = new_key.to(tl.float32)
    if PADDED and not QUANTIZED:
        # K and V of a hidden token may be NaN, and its weight of 0 times NaN is NaN. Only x - x == 0 for finite x.
        wide_value = new_value.to(tl.float32)
        new_key = tl.where((shown > 0) | (wide - wide == 0.0), new_key, 0.0)
        new_value = tl.where((shown > 0) | (wide_value - wide_value == 0.0), new_value, 0.0)
    if QUANTIZED:
        new_scale = tl.load(key_scale + row)
        wide *= new_scale
        tl.store(key_scales + slot, new_scale)
        tl.store(value_scales + slot, tl.load(value_scale + row))
    tl.store(keys + slot * DK + dk, new_key, mask=dk < DK)
    tl.store(values + slot * DV + dv, new_value, mask=dv < DV)

    if BOUNDS:
        extreme = (row * pages + page) * DK + dk
        low = tl.load(minima + extreme, mask=dk < DK).to(tl.float32)
        high = tl.load(maxima + extreme, mask=dk < DK).to(tl.float32)
        lowest, highest = tl.where(shown > 0, wide, float("inf")), tl.where(shown > 0, wide, float("-inf"))
        low = tl.where(opening, lowest, tl.minimum(low, lowest))
        high = tl.where(opening, highest, tl.maximum(high, highest))
        tl.store(minima + extreme, low.to(minima.dtype.element_ty), mask=dk < DK)
        tl.store(maxima + extreme, high.to(maxima.dtype.element_ty), mask=dk < DK)


def append(
    keys: Tensor, values: Tensor, bias: Tensor, positions: Tensor, priority: Tensor, open_slot: Tensor, clock: Tensor,
    key: Tensor, value: Tensor, page_size: int, minima: Tensor | None = None, maxima: Tensor | None = None,
    scales: Scales | None = None, visible: Tensor | None = None, may_close: bool = False,
) -> None:  # fmt: skip
    """See `raas_kernels.reference.append`."""
    batch, heads, slots, dk = keys.shape
    dv = values.shape[-1]
    new_scales = (bias, bias)
    if scales is not None:
        if visible is not None:
            key, value = (finite(new, ~visible[:, None, None, None]) for new in (key, value))
        (key, key_scale), (value, value_scale) = quantize(key, keys.dtype), quantize(value, values.dtype)
        new_scales = (key_scale, value_scale)
    key, value = (t.reshape(batch * heads, -1) for t in (key, value))
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    bounds = minima is not None
    append_kernel[(batch * heads,)](
        keys, values, bias, positions, priority, open_slot, clock, key, value,
        minima if bounds else keys, maxima if bounds else keys, *(scales or new_scales), *new_scales,
        bias if visible is None else visible.contiguous(),
        heads, slots // page_size, priority.shape[-1], key.stride(0), value.stride(0),
        PAGE=page_size, DK=dk, DV=dv, BOUNDS=bounds, QUANTIZED=scales is not None, PADDED=visible is not None,
        MAY_CLOSE=may_close, BLOCK_PAGES=triton.next_power_of_2(priority.shape[-1]),
        BLOCK_DK=triton.next_power_of_2(dk), BLOCK_DV=triton.next_power_of_2(dv),
    )  # fmt: skip


@triton.jit
def store_scores(
    unit_logit, scores, row, block, pages, total_max, inverse, group, in_group,
    SUM: tl.constexpr, MEAN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_PAGES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """The scores of one block of a row's pages, from the logits that were kept and the softmax's maximum and sum."""
    page = block * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    weight = tl.zeros([BLOCK_GROUP, BLOCK_PAGES], tl.float32)
    for i in range(UNITS):
        unit = (row * GROUP + group[:, None]) * pages * UNITS + page[None, :] * UNITS + i
        here = tl.load(unit_logit + unit, mask=in_group[:, None] & (page[None, :] < pages), other=float("-inf"))
        here = tl.exp(here - total_max[:, None]) * inverse[:, None]
        weight = weight + here if SUM else tl.maximum(weight, here)
    score = tl.sum(weight, 0) / GROUP if MEAN else tl.max(weight, 0)
    tl.store(scores + row * pages + page, score, mask=page < pages)


@triton.jit
def attend_kernel(
    query, keys, values, bias, table, key_scales, value_scales, sinks, scale, softcap,
    part_output, part_max, part_sum, unit_logit, output, scores,
    heads, slots, slots_per_slice, stored_slots,
    CAPPED: tl.constexpr, TABLE: tl.constexpr, QUANTIZED: tl.constexpr, SINKS: tl.constexpr,
    SUM: tl.constexpr, MEAN: tl.constexpr, WHOLE: tl.constexpr,
    GROUP: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_PAGES: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Online softmax over one slice of a row's slots; with WHOLE the slice is all of them, and nothing is left to join.

    Of each (query head, UNIT slots) the largest logit is kept, or with SUM the logarithm of the sum of exponentials.
    """
    row = tl.program_id(0).to(tl.int64)
    slice_id = tl.program_id(1)
    slices = tl.num_programs(1)
    group = tl.arange(0, BLOCK_GROUP)
    dk = tl.arange(0, BLOCK_DK)
    dv = tl.arange(0, BLOCK_DV)
    lane = tl.arange(0, BLOCK_SLOTS)
    in_group = group < GROUP

    q = tl.load(
        query + (row * GROUP + group[:, None]) * DK + dk[None, :],
        mask=in_group[:, None] & (dk[None, :] < DK), other=0.0,
    ).to(OPERAND)  # fmt: skip
    running_max = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_GROUP], tl.float32)
    summed = tl.zeros([BLOCK_GROUP, BLOCK_DV], tl.float32)

    begin = slice_id * slots_per_slice
    end = tl.minimum(begin + slots_per_slice, slots)
    for start in range(begin, end, BLOCK_SLOTS):
        slot = start + lane
        inside = slot < end
        if TABLE:
            page = tl.load(table + row * (slots // PAGE) + slot // PAGE, mask=inside, other=0)
            stored = row * stored_slots + page * PAGE + slot % PAGE
        else:
            stored = row * stored_slots + slot
        absent = tl.load(bias + stored, mask=inside, other=float("-inf"))
        k = tl.load(
            keys + stored[:, None] * DK + dk[None, :], mask=inside[:, None] & (dk[None, :] < DK), other=0.0
        ).to(OPERAND)  # fmt: skip
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if QUANTIZED:
            logits *= tl.load(key_scales + stored, mask=inside, other=0.0)[None, :]
        if CAPPED:
            logits = capped(logits, softcap)
        logits += absent[None, :]

        by_unit = tl.reshape(logits, [BLOCK_GROUP, BLOCK_SLOTS // UNIT, UNIT])
        kept = tl.max(by_unit, 2)
        if SUM:
            finite = tl.where(kept == float("-inf"), 0.0, kept)
            # The largest gives exp(0), so a sum below 1 is that of no token at all.
            total = tl.sum(tl.exp(by_unit - finite[:, :, None]), 2)
            kept += tl.log(tl.maximum(total, 1.0))
        unit = start // UNIT + tl.arange(0, BLOCK_SLOTS // UNIT)
        tl.store(
            unit_logit + (row * GROUP + group[:, None]) * (slots // UNIT) + unit[None, :],
            kept, mask=in_group[:, None] & (unit[None, :] < end // UNIT),
        )  # fmt: skip

        new_max = tl.maximum(running_max, tl.max(logits, 1))
        # A slice may hold no resident token yet: keep -inf - -inf out of the exponent.
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp(logits - anchor[:, None])
        rescale = tl.exp(running_max - anchor)
        v = tl.load(
            values + stored[:, None] * DV + dv[None, :], mask=inside[:, None] & (dv[None, :] < DV), other=0.0
        ).to(OPERAND)  # fmt: skip
        running_sum = running_sum * rescale + tl.sum(weights, 1)
        if QUANTIZED:
            weights *= tl.load(value_scales + stored, mask=inside, other=0.0)[None, :]
        summed = summed * rescale[:, None] + tl.dot(weights.to(OPERAND), v, input_precision="ieee")
        running_max = new_max

    inside_output = in_group[:, None] & (dv[None, :] < DV)
    if WHOLE:
        total_max = running_max
        if SINKS:
            sink = tl.load(sinks + (row % heads) * GROUP + group, mask=in_group, other=float("-inf")).to(tl.float32)
            total_max = tl.maximum(total_max, sink)
        total_max = tl.where(in_group, total_max, 0.0)
        rescale = tl.exp(running_max - total_max)
        total_sum = running_sum * rescale
        if SINKS:
            total_sum += tl.exp(sink - total_max)
        inverse = 1.0 / tl.where(in_group, total_sum, 1.0)
        tl.store(
            output + (row * GROUP + group[:, None]) * DV + dv[None, :],
            (summed * (rescale * inverse)[:, None]).to(output.dtype.element_ty), mask=inside_output,
        )  # fmt: skip
        tl.debug_barrier()  # the logits kept are other threads' too
        for block in range(tl.cdiv(slots // PAGE, BLOCK_PAGES)):
            store_scores(
                unit_logit, scores, row, block, slots // PAGE, total_max, inverse, group, in_group,
                SUM, MEAN, GROUP, BLOCK_GROUP, BLOCK_PAGES, PAGE // UNIT,
            )  # fmt: skip
    else:
        part = (row * slices + slice_id) * GROUP + group
        tl.store(part_max + part, running_max, mask=in_group)
        tl.store(part_sum + part, running_sum, mask=in_group)
        tl.store(part_output + part[:, None] * DV + dv[None, :], summed, mask=inside_output)


@triton.jit
def reduce_kernel(
    part_output, part_max, part_sum, unit_logit, sinks, output, scores, pages, slices, heads,
    SINKS: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_PAGES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Joins the slices: program (row, 0) writes the row's output, program (row, i) the scores of its block of pages."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    group = tl.arange(0, BLOCK_GROUP)
    in_group = group < GROUP
    part = row * slices * GROUP + group

    total_max = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    for i in range(slices):
        total_max = tl.maximum(total_max, tl.load(part_max + part + i * GROUP, mask=in_group, other=float("-inf")))
    if SINKS:
        sink = tl.load(sinks + (row % heads) * GROUP + group, mask=in_group, other=float("-inf")).to(tl.float32)
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

    if block == 0:
        dv = tl.arange(0, BLOCK_DV)
        inside = in_group[:, None] & (dv[None, :] < DV)
        joined = tl.zeros([BLOCK_GROUP, BLOCK_DV], tl.float32)
        for i in range(slices):
            slice_max = tl.load(part_max + part + i * GROUP, mask=in_group, other=float("-inf"))
            slice_output = tl.load(part_output + (part + i * GROUP)[:, None] * DV + dv[None, :], mask=inside, other=0.0)
            joined += slice_output * tl.exp(slice_max - total_max)[:, None]
        tl.store(
            output + (row * GROUP + group[:, None]) * DV + dv[None, :],
            (joined * inverse[:, None]).to(output.dtype.element_ty), mask=inside,
        )  # fmt: skip

    store_scores(
        unit_logit, scores, row, block, pages, total_max, inverse, group, in_group,
        SUM, MEAN, GROUP, BLOCK_GROUP, BLOCK_PAGES, UNITS,
    )  # fmt: skip


def _dot_operand(dtype: torch.dtype) -> tl.dtype:
    """What `tl.dot` multiplies: the cache's dtype; float32 in the interpreter, which multiplies bfloat16 as bits."""
    operands = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    if dtype not in operands:
        raise TypeError(f"The Triton kernels take float16, bfloat16 or float32, not {dtype}: set RAAS_KERNELS=torch.")
    return tl.float32 if triton.knobs.runtime.interpret else operands[dtype]


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def attend(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float, page_size: int,
    softcap: float | None = None, sinks: Tensor | None = None, table: Tensor | None = None,
    scales: Scales | None = None, page_score: Reduction = "max", group_score: Reduction = "max",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `raas_kernels.reference.attend`."""
    rows, head_size = keys.shape[0] * keys.shape[1], max(keys.shape[-1], values.shape[-1])
    slots = keys.shape[2] if table is None else table.shape[-1] * page_size
    config = choose_config(_capability(query.device), rows, slots, head_size, query.element_size())
    return attend_as(
        config, query, keys, values, bias, scale, page_size, softcap, sinks, table, scales, page_score, group_score
    )


def attend_as(
    config: Config, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float, page_size: int,
    softcap: float | None = None, sinks: Tensor | None = None, table: Tensor | None = None,
    scales: Scales | None = None, page_score: Reduction = "max", group_score: Reduction = "max",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attend`, launched as `config` says."""
    # The store is contiguous; what a model expands of a latent need not be.
    query, keys, values, bias = (t.contiguous() for t in (query, keys, values, bias))
    batch, heads, stored_slots, dk = keys.shape
    dv, rows = values.shape[-1], batch * heads
    group = query.shape[1] // heads
    pages = stored_slots // page_size if table is None else table.shape[-1]
    slots = pages * page_size
    tile = config.tile
    unit = min(page_size, tile)
    slices = max(1, min(config.programs // rows, triton.cdiv(slots, tile)))
    slots_per_slice = triton.cdiv(triton.cdiv(slots, slices), tile) * tile
    slices = triton.cdiv(slots, slots_per_slice)

    is_whole = slices == 1
    scratch: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    unit_logit = torch.empty(rows, group, slots // unit, **scratch)
    output = torch.empty(batch, heads * group, 1, dv, dtype=query.dtype, device=query.device)
    scores = torch.empty(batch, heads, pages, **scratch)
    if is_whole:
        part_output = part_max = part_sum = scores
    else:
        part_output = torch.empty(rows, slices, group, dv, **scratch)
        part_max, part_sum = (torch.empty(rows, slices, group, **scratch) for _ in range(2))
    block_pages = min(128, triton.next_power_of_2(pages))
    options = {
        "SINKS": sinks is not None, "SUM": page_score == "sum", "MEAN": group_score == "mean", "GROUP": group, "DV": dv,
        "BLOCK_GROUP": max(MIN_DOT, triton.next_power_of_2(group)), "BLOCK_PAGES": block_pages,
        "BLOCK_DV": max(MIN_DOT, triton.next_power_of_2(dv)),
    }  # fmt: skip
    sinks = output if sinks is None else sinks
    attend_kernel[(rows, slices)](
        query, keys, values, bias, bias if table is None else table.contiguous(), *(scales or (bias, bias)), sinks,
        scale, 1.0 if softcap is None else softcap, part_output, part_max, part_sum, unit_logit, output, scores,
        heads, slots, slots_per_slice, stored_slots,
        CAPPED=softcap is not None, TABLE=table is not None, QUANTIZED=scales is not None, WHOLE=is_whole,
        PAGE=page_size, UNIT=unit, DK=dk, BLOCK_SLOTS=tile,
        BLOCK_DK=max(MIN_DOT, triton.next_power_of_2(dk)), OPERAND=_dot_operand(query.dtype),
        num_warps=config.warps, num_stages=config.stages, **options,
    )  # fmt: skip
    if not is_whole:
        reduce_kernel[(rows, triton.cdiv(pages, block_pages))](
            part_output, part_max, part_sum, unit_logit, sinks, output, scores, pages, slices, heads,
            UNITS=page_size // unit, **options,
        )  # fmt: skip
    return output, scores


@triton.jit
def page_bounds_kernel(
    query, minima, maxima, bias, bounds, scale, softcap, pages,
    CAPPED: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DK: tl.constexpr,
    BLOCK_PAGES: tl.constexpr, BLOCK_DK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    page = tl.program_id(1) * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    dk = tl.arange(0, BLOCK_DK)
    exists = page < pages
    inside = exists[:, None] & (dk[None, :] < DK)
    address = (row * pages + page[:, None]) * DK + dk[None, :]
    low = tl.load(minima + address, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(maxima + address, mask=inside, other=0.0).to(tl.float32)
    lane = tl.arange(0, PAGE)
    absent = tl.load(
        bias + (row * pages + page[:, None]) * PAGE + lane[None, :], mask=exists[:, None], other=float("-inf")
    )
    best = tl.full([BLOCK_PAGES], float("-inf"), tl.float32)
    for g in range(GROUP):
        q = tl.load(query + (row * GROUP + g) * DK + dk, mask=dk < DK, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.sum(tl.maximum(q[None, :] * low, q[None, :] * high), 1))
    best *= scale
    if CAPPED:
        best = capped(best, softcap)
    best = tl.where(tl.max(absent, 1) == 0, best, float("-inf"))
    tl.store(bounds + row * pages + page, best, mask=exists)


def page_bounds(
    query: Tensor, minima: Tensor, maxima: Tensor, bias: Tensor, scale: float, page_size: int,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """See `raas_kernels.reference.page_bounds`."""
    batch, heads, pages, dk = minima.shape
    bounds = torch.empty(batch, heads, pages, dtype=torch.float32, device=query.device)
    block_pages = min(32, triton.next_power_of_2(pages))
    page_bounds_kernel[(batch * heads, triton.cdiv(pages, block_pages))](
        query.contiguous(), minima, maxima, bias, bounds, scale, 1.0 if softcap is None else softcap, pages,
        CAPPED=softcap is not None, GROUP=query.shape[1] // heads, PAGE=page_size, DK=dk,
        BLOCK_PAGES=block_pages, BLOCK_DK=triton.next_power_of_2(dk),
    )  # fmt: skip
    return bounds


@triton.jit
def stamp_kernel(
    priority, scores, first, clock, score_row, score_head, first_row, first_head, first_page,
    heads, decode_pages, alpha,
    TOP_RATIO: tl.constexpr, BLOCK_PAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = scores + (row // heads) * score_row + (row % heads) * score_head
    born = first + (row // heads) * first_row + (row % heads) * first_head
    target = priority + row * decode_pages
    page = tl.program_id(1) * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    exists = page < decode_pages
    score = tl.load(source + page, mask=exists, other=0.0)
    if TOP_RATIO is None:
        milestone = exists & (score >= alpha)
    else:
        # A page is in the top k if fewer than k held pages beat it: no sort, no data-dependent shape.
        birth = tl.load(born + page * first_page, mask=exists, other=0)
        better = tl.zeros([BLOCK_PAGES], tl.int32)
        count = 0
        for start in range(0, decode_pages, BLOCK_PAGES):
            rival = start + tl.arange(0, BLOCK_PAGES)
            # Another program may be stamping this rival: held stays held, which is all that is read of it.
            alive = tl.load(target + rival, mask=rival < decode_pages, other=float("-inf")) > float("-inf")
            other = tl.load(source + rival, mask=rival < decode_pages, other=0.0)
            rival_birth = tl.load(born + rival * first_page, mask=rival < decode_pages, other=0)
            beats = (other[None, :] > score[:, None]) | (
                (other[None, :] == score[:, None]) & (rival_birth[None, :] < birth[:, None])
            )
            better += tl.sum((beats & alive[None, :]).to(tl.int32), 1)
            count += tl.sum(alive.to(tl.int32), 0)
        held = tl.load(target + page, mask=exists, other=float("-inf")) > float("-inf")
        milestone = held & (better < tl.ceil(count.to(tl.float64) * TOP_RATIO))  # type: ignore[attr-defined]
    tl.store(target + page, tl.load(clock + row * 2).to(tl.float64), mask=milestone)


def stamp(
    priority: Tensor, scores: Tensor, first: Tensor, clock: Tensor, alpha: float | None, top_ratio: float | None
) -> None:
    """See `raas_kernels.reference.stamp`."""
    batch, heads, decode_pages = priority.shape
    block_pages = min(64, triton.next_power_of_2(decode_pages))
    stamp_kernel[(batch * heads, triton.cdiv(decode_pages, block_pages))](
        priority, scores, first, clock, *scores.stride()[:2], *first.stride(), heads, decode_pages,
        0.0 if alpha is None else alpha, TOP_RATIO=top_ratio, BLOCK_PAGES=block_pages,
    )  # fmt: skip
