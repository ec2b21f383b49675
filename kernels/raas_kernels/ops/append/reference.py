"""Append in plain torch: the engine of CPU tensors, and the standard of the Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ...paged_kv import PagedKV, finite, take_rows
from ...quantize import dequantize, pack_page, pack_values, quantize


def victim(kv: PagedKV, rows: Tensor | None = None) -> Tensor:
    """The page that `append` recycles next: of the evictable pages the smallest (priority, first token index).

    Empty pages have priority -inf and come first, the leftmost before the others.

    Args:
        rows: `[R]` int64, the batch rows asked about; None for all. Each must have an evictable page.

    Returns:
        `[R, H]` int64, page index.
    """
    priority, first, evictable = kv.priority, kv.first, kv.evictable  # [R, H, P], [R, H, P], [R, P]
    if rows is not None:
        priority, first, evictable = (take_rows(buffer, rows) for buffer in (priority, first, evictable))
    closed = ~evictable[:, None]  # [R, 1, P]
    smallest = priority.masked_fill(closed, float("inf")).amin(-1, keepdim=True)
    others = (priority > smallest) | closed
    return first.masked_fill(others, torch.iinfo(first.dtype).max).argmin(-1)


def append(
    kv: PagedKV,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None = None,
    rows: Tensor | None = None,
    may_close: bool = False,
) -> None:
    """See `raas_kernels.append`. Rows in blocks, or at different places of their open pages, take `append_in_graph`."""
    clocks = kv.clock.flatten(0, 1).tolist()  # B * H pairs of (sequence index, decode-token index)
    is_one_clock = clocks.count(clocks[0]) == len(clocks)
    is_spread = rows is not None or kv.blocks is not None
    if is_spread or not (is_one_clock or all(clock[1] == clocks[0][1] for clock in clocks)):
        append_in_graph(kv, key, value, visible, rows, may_close)
        return
    size = kv.page_size

    # 1. Advance the clock. One number for all rows costs fewer operators than a tensor.
    kv.clock.add_(1)
    offset = (clocks[0][1] + 1) % size
    now = clocks[0][0] + 1 if is_one_clock else kv.clock[..., :1]  # a number, or [B, H, 1]

    # 2. If the open page is full, recycle a page: no token, positions to come, no states.
    page = None  # [B, H, 1], the open page
    if offset == 0:
        page = victim(kv).unsqueeze(-1)
        torch.mul(page[..., 0], size, out=kv.open_slot)
        lane = torch.arange(size, device=kv.bias.device)
        slots = kv.open_slot[..., None] + lane  # [B, H, S]
        kv.bias.scatter_(2, slots, float("-inf"))
        kv.positions.scatter_(2, slots, (now + lane).int().expand_as(slots))
        if kv.states is not None:
            kv.states.scatter_(2, page[..., None].expand(-1, -1, -1, kv.states.shape[3]), 0)

    # 3. Write the token into its slot.
    slot = (kv.open_slot + offset).unsqueeze(-1)  # [B, H, 1]
    hidden = None if visible is None or visible.all() else ~visible[:, None, None]  # [B, 1, 1]
    if hidden is not None:
        key, value = finite(key, hidden[..., None]), finite(value, hidden[..., None])
    writes, key = _writes(kv, key, value)
    for buffer, new in writes:
        buffer.scatter_(2, (slot if new.ndim == 3 else slot.unsqueeze(-1)).expand_as(new), new)
    if kv.open_keys is not None:
        kv.open_keys[:, :, offset : offset + 1] = key
    if hidden is None:
        kv.bias.scatter_(2, slot, 0)
    else:
        kv.bias.scatter_(2, slot, torch.zeros_like(slot, dtype=kv.bias.dtype).masked_fill_(hidden, float("-inf")))

    # 4. The open page's priority becomes the present.
    if may_close or offset in (0, size - 1):
        page = kv.open_slot.unsqueeze(-1) // size if page is None else page
        if isinstance(now, Tensor):
            kv.priority.scatter_(2, page, now.to(kv.priority.dtype))
        else:
            kv.priority.scatter_(2, page, now)

    # 5. Widen the page's key_min and key_max by a visible key.
    if kv.key_min is not None and kv.key_max is not None:
        page = kv.open_slot.unsqueeze(-1) // size if page is None else page
        index = page.unsqueeze(-1).expand_as(key)  # [B, H, 1, Dk]
        for extreme, fold, empty in (
            (kv.key_min, torch.minimum, float("inf")),
            (kv.key_max, torch.maximum, float("-inf")),
        ):
            seen = key if hidden is None else key.masked_fill(hidden[..., None], empty)
            extreme.scatter_(2, index, seen if offset == 0 else fold(extreme.gather(2, index), seen))

    # 6. In a 4-bit cache, code the keys of a page that is full.
    if kv.open_keys is not None and kv.key_min is not None and kv.key_max is not None and offset == size - 1:
        slots = kv.open_slot[..., None] + torch.arange(size, device=kv.bias.device)  # [B, H, S]
        codes, low, high = pack_page(kv.open_keys, kv.bias.gather(2, slots) != 0)
        kv.keys.scatter_(2, slots[..., None].expand_as(codes), codes)
        index = (kv.open_slot[..., None, None] // size).expand(-1, -1, 1, low.shape[-1])
        kv.key_min.scatter_(2, index, low.unsqueeze(2))
        kv.key_max.scatter_(2, index, high.unsqueeze(2))


def append_in_graph(
    kv: PagedKV,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None = None,
    rows: Tensor | None = None,
    may_close: bool = False,
) -> None:
    """`append` for rows that stand at different tokens: it reads the clock on the device only.

    `torch.compile` traces it into one graph.
    """
    size, device = kv.page_size, key.device
    row = (torch.arange(key.shape[0], device=device) if rows is None else rows)[:, None]
    head = torch.arange(key.shape[1], device=device)  # row [R, 1] and head [H] index [R, H]

    def put(buffer: Tensor, index: Tensor, new: Tensor) -> None:
        """Write `new` at `index` `[R, H]` or `[R, H, S]` of the buffer's third dimension."""
        spread = [at.view(*at.shape, *[1] * (index.ndim - 2)) for at in (row, head)]
        buffer.index_put_((*spread, index), new.to(buffer.dtype))  # inductor does this in place, unlike scatter_

    # 1. Advance the clock.
    clock = take_rows(kv.clock, rows) + 1  # [R, H, 2]
    _put_rows(kv.clock, rows, clock)
    now, offset = clock[..., 0], clock[..., 1] % size  # [R, H]

    # 2. If the open page is full, recycle a page: no token, positions to come, no states.
    opening = offset == 0
    start = torch.where(opening, victim(kv, rows) * size, take_rows(kv.open_slot, rows))
    _put_rows(kv.open_slot, rows, start)
    page, lane = start // size, torch.arange(size, device=device)
    slots = start[..., None] + lane  # [R, H, S]
    at = (row[..., None], head[:, None], slots)
    put(kv.positions, slots, torch.where(opening[..., None], (now[..., None] + lane).int(), kv.positions[at]))
    shown = torch.ones_like(opening) if visible is None else visible[:, None].expand_as(opening)
    others = torch.where(opening[..., None], float("-inf"), kv.bias[at])
    own = torch.where(shown, 0.0, float("-inf")).to(kv.bias.dtype)
    put(kv.bias, slots, torch.where(lane == offset[..., None], own[..., None], others))
    if kv.states is not None:
        put(kv.states, page, torch.where(opening[..., None], 0.0, kv.states[row, head, page]))

    # 3. Write the token into its slot. Where the contents of the open page are: its row and first slot, or its block.
    place, begin, has_memory = row.expand_as(start), start, None  # [R, H]
    if kv.blocks is not None:
        place, begin = kv.blocks[row, page].long(), torch.zeros_like(start)
        has_memory = place > 0
    key, value = (new[:, :, 0] if visible is None else finite(new[:, :, 0], ~shown[..., None]) for new in (key, value))
    writes, key = _writes(kv, key, value)
    for buffer, new in writes:
        _put_where(has_memory, buffer, (place, head, begin + offset), new)

    # 4. The open page's priority becomes the present.
    stamped = torch.ones_like(opening) if may_close else opening | (offset == size - 1)
    put(kv.priority, page, torch.where(stamped, now.to(kv.priority.dtype), kv.priority[row, head, page]))

    # 5. Widen the page's key_min and key_max by a visible key.
    if kv.key_min is not None and kv.key_max is not None:
        for extreme, fold, empty in (
            (kv.key_min, torch.minimum, float("inf")),
            (kv.key_max, torch.maximum, float("-inf")),
        ):
            seen = torch.where(shown[..., None], key, empty)
            put(extreme, page, torch.where(opening[..., None], seen, fold(extreme[row, head, page], seen)))

    # 6. In a 4-bit cache, code the keys of a page that is full.
    if kv.open_keys is not None and kv.key_min is not None and kv.key_max is not None:
        put(kv.open_keys, offset, key)
        codes, low, high = pack_page(kv.open_keys[row, head], kv.bias[at] != 0)  # [R, H, S, Dk / 2], [R, H, Dk]
        closing = offset == size - 1  # [R, H]
        written = closing if has_memory is None else closing & has_memory
        _put_where(written[..., None], kv.keys, (place[..., None], head[:, None], begin[..., None] + lane), codes)
        closing = closing[..., None]
        put(kv.key_min, page, torch.where(closing, low, kv.key_min[row, head, page]))
        put(kv.key_max, page, torch.where(closing, high, kv.key_max[row, head, page]))


def _put_where(where: Tensor | None, buffer: Tensor, index: tuple[Tensor, ...], new: Tensor) -> None:
    """Write `new` at `index` of the first three dimensions of a buffer, where `where` is True; everywhere for None."""
    if where is not None:
        new = torch.where(where if new.ndim == where.ndim else where[..., None], new, buffer[index])
    buffer.index_put_(index, new.to(buffer.dtype))


def _put_rows(buffer: Tensor, rows: Tensor | None, new: Tensor) -> None:
    """Write `new` `[R, ...]` into the rows of a buffer `[B, ...]`."""
    if rows is None:
        buffer.copy_(new)
    else:
        buffer.index_copy_(0, rows, new)


def _writes(kv: PagedKV, key: Tensor, value: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Pairs of (buffer, what to write into its slot) for one token, and the key as attention will read it."""
    if kv.value_min is not None and kv.value_max is not None:
        codes, low, high = pack_values(value)
        return [(kv.values, codes), (kv.value_min, low), (kv.value_max, high)], key
    if kv.key_scales is None or kv.value_scales is None:
        return [(kv.keys, key), (kv.values, value)], key
    key_codes, key_scale = quantize(key, kv.keys.dtype)
    value_codes, value_scale = quantize(value, kv.values.dtype)
    # Codes move as bytes, because torch has few operators for float8.
    return [
        (kv.keys.view(torch.int8), key_codes.view(torch.int8)),
        (kv.values.view(torch.int8), value_codes.view(torch.int8)),
        (kv.key_scales, key_scale),
        (kv.value_scales, value_scale),
    ], dequantize(key_codes, key_scale, torch.promote_types(key.dtype, torch.float32))
