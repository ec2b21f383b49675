"""Write prefill tokens into pages, and take them back."""

from __future__ import annotations

import copy

import numpy as np
import torch

import raas_kernels

from .packed_pages import write_prefill_keys
from .page_table import NOT_RESERVED, PageTable
from .resize import allocating, movable
from .row_counts import Rows


class Places:
    """The slots of the prefill tokens of one forward, for each row.

    The tokens of a row first fill its last pinned page, and then new pages. The new pages follow the pinned pages if
    the row has no decode token yet. Otherwise they follow all pages that the row uses or may use for decode tokens.
    With `prompt="evict"`, the sink is the only pinned page after a prefill, and counts as full.

    Args:
        rows: int64 `[rows]`, the rows that the forward touches.
        new: number of tokens of the forward.
        leading: `[rows]`, number of hidden tokens before the first visible token. If the row is empty, they are left
            padding, and get no slot.
    """

    def __init__(self, table: PageTable, rows: np.ndarray, new: int, leading: np.ndarray):
        counts, size = table.counts, table.page_size
        self.new, self.page_size = new, size
        # 1. Tokens without padding.
        self.dropped = np.where(counts.hold_nothing[rows], leading, 0)
        self.stored = new - self.dropped
        self.begins = counts.hold_nothing[rows] & (self.stored > 0)  # whether the row's first token is among them
        # 2. The rest of the last pinned page.
        prefilled = counts.prefilled[rows]
        self.room = np.minimum(-prefilled % size, self.stored)
        columns = np.arange(counts.pinned.shape[1])
        last = np.where(counts.pinned[rows], columns, 0).max(1, initial=0)
        self.tail = last * size + prefilled % size
        # 3. New pages.
        self.pages = -(-(self.stored - self.room) // size)
        self.is_fresh = (counts.decoded[rows] == 0) & (counts.released[rows] == 0)
        self.base = np.where(self.is_fresh, counts.pinned_pages[rows], _end_of_pages(table, rows))

    def of_whole_prompt(self, prefilled: int) -> Places:
        """The places of all `prefilled` tokens of a prompt of which these are the last ones, in the only row."""
        whole = copy.copy(self)
        whole.new, whole.stored = prefilled, np.full_like(self.stored, prefilled)
        whole.dropped = whole.room = whole.base = np.zeros_like(self.base)
        whole.begins, whole.pages = np.ones_like(self.begins), -(-whole.stored // self.page_size)
        return whole

    @property
    def pages_needed(self) -> int:
        """Number of pages that a row needs for the new tokens and all earlier tokens."""
        return int((self.base + self.pages).max(initial=0))

    @property
    def segments(self) -> list[tuple[slice, slice]] | None:
        """(Tokens, slots) of each run of tokens, if they are the same in all rows; otherwise None."""
        placed = np.stack([self.dropped, self.room, self.tail, self.base])
        if (placed != placed[:, :1]).any():
            return None
        dropped, room, tail, base = (int(value) for value in placed[:, 0])
        begin, rest = base * self.page_size, self.new - dropped - room
        runs = [(dropped, tail, room), (dropped + room, begin, rest)]
        return [(slice(token, token + count), slice(slot, slot + count)) for token, slot, count in runs if count]

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each token that gets a slot: index in `rows`, index among the new tokens, slot; `[stored tokens]` each."""
        token = np.arange(self.new)[None]
        nth = token - self.dropped[:, None]  # [rows, new], negative for padding
        behind = self.base[:, None] * self.page_size + nth - self.room[:, None]
        slot = np.where(nth < self.room[:, None], self.tail[:, None] + nth, behind)
        row, place = np.nonzero(nth >= 0)
        return row, place, slot[row, place]


def _end_of_pages(table: PageTable, rows: np.ndarray) -> np.ndarray:
    """The page behind all pages that each of `rows` uses or may use for decode tokens, `[rows]`."""
    counts = table.counts
    pinned, limit = counts.pinned[rows], counts.limit[rows]
    decode_pages = table.opened[rows] if table.settings.grows else limit
    free = ~pinned
    used = pinned | (free & (free.cumsum(1) <= decode_pages[:, None]))
    end = np.where(used, np.arange(1, used.shape[1] + 1), 0).max(1, initial=0)
    return np.where(free.sum(1) >= decode_pages, end, table.num_pages)


@allocating
def write_prefill(
    table: PageTable,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None = None,
    leading: list[int] | None = None,
    rows: Rows | None = None,
) -> Places:
    """Write the prefill tokens of one forward into pinned pages.

    With `prompt="evict"`, the pages are pinned until `Prefill.evict` makes them evictable.

    Args:
        key, value: `[rows, kv_heads, new, head_dim]`.
        visible: `[rows, new]` bool, False where the attention mask hides a token; None if it hides no token.
        leading: for each row, the number of hidden tokens before its first visible token; None to count them here.
        rows: the rows that the forward touches; None for all.

    Raises:
        RuntimeError: a row needs more pages than it has reserved in the pool. Nothing has changed.
    """
    touched = np.arange(table.batch_size) if rows is None else rows.on_host
    new = key.shape[2]
    if leading is None:
        leading = [0] * len(touched) if visible is None else count_leading(visible)
    counts = table.counts
    places = Places(table, touched, new, np.array(leading, np.int64))
    if table.blocks is not None:
        needed, reserved = places.base + places.pages, table.blocks.reserved[touched]
        for i in np.flatnonzero((needed > reserved) & (places.pages > 0))[:1]:
            raise RuntimeError(NOT_RESERVED.format(row=touched[i], reserved=reserved[i], needed=needed[i]))
    # 1. Pages: pin the pages of the new tokens, and compute how many evictable pages each row may have.
    pages = _pages_for(table, touched, places)
    seen, decoded = counts.seen[touched].copy(), counts.decoded[touched].copy()
    limits = _limits_after(table, touched, places)
    columns = np.arange(pages)
    taken = (columns >= places.base[:, None]) & (columns < (places.base + places.pages)[:, None])
    before = table.kv, counts.pinned, counts.limit
    try:
        table.resize(pages)
        counts.pinned, counts.limit = counts.pinned.copy(), counts.limit.copy()
        counts.pinned[touched] |= taken
        counts.limit[touched] = limits
        table.lay_out()
    except BaseException:
        table.kv, counts.pinned, counts.limit = before
        raise
    counts.seen[touched] += new
    counts.padding[touched] += places.dropped
    counts.prefilled[touched] += places.stored
    table.tokens += new
    table.is_empty = False
    # 2. Keys, values and positions.
    _write(table, places, key, value, visible, torch.from_numpy(seen).to(table.device), rows)
    # 3. The clock. The free slots of an open page will hold tokens that come after the new tokens.
    _move_positions(table, new, decoded, rows)
    kv = table.kv
    assert kv is not None
    if rows is None:
        kv.clock[..., 0] += new
    else:
        kv.clock[rows.on_device, :, 0] += new
    table.summarise()
    return places


def count_leading(visible: torch.Tensor) -> list[int]:
    """For each row of `visible` `[rows, new]`, the number of hidden tokens before the first visible token."""
    if visible.is_meta:  # `raas_cache.plan` needs sizes only
        return [0] * len(visible)
    counts: list[int] = (visible.cumsum(1) == 0).sum(1).tolist()
    return counts


def _limits_after(table: PageTable, touched: np.ndarray, places: Places) -> np.ndarray:
    """Number of evictable pages that each row may have, `[rows]`. It is fixed when the row starts to decode."""
    counts = table.counts
    if table.settings.prompt == "evict":
        return np.full(len(touched), table.limit_beside(1))
    after = counts.pinned_pages[touched] + places.pages
    settled = counts.decoded[touched] > 0
    fresh = np.array([table.limit_beside(int(pages)) for pages in after], np.int64)
    return np.where(settled, counts.limit[touched], fresh)


def _pages_for(table: PageTable, touched: np.ndarray, places: Places) -> int:
    """Number of pages for the new tokens, and for the first decode tokens of rows that have not decoded yet."""
    if table.blocks is not None:  # `reserve` made room for them
        return table.num_pages
    if table.settings.prompt == "evict":
        return max(
            places.pages_needed, 0 if places.is_fresh.all() and len(touched) == table.batch_size else table.num_pages
        )
    limits = _limits_after(table, touched, places)
    needed = places.base + places.pages
    for i in np.flatnonzero(places.is_fresh):
        needed[i] += table.pages_to_allocate(0, int(limits[i]))
    is_whole = places.is_fresh.all() and len(touched) == table.batch_size
    return max(int(needed.max()), 0 if is_whole else table.num_pages)


def _write(
    table: PageTable,
    places: Places,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    seen: torch.Tensor,
    rows: Rows | None,
) -> None:
    kv, device, heads = table.kv, table.device, table.num_heads
    assert kv is not None
    count, _, new, _ = key.shape
    bias = torch.zeros(count, 1, new, dtype=kv.bias.dtype, device=device)
    if visible is not None:
        hidden = ~visible[:, None]  # [rows, 1, new]
        bias.masked_fill_(hidden, float("-inf"))
        key, value = (raas_kernels.finite(states, hidden[..., None]) for states in (key, value))
    positions = seen[:, None, None] + torch.arange(new, device=device)  # [rows, 1, new]
    writes = [(kv.bias, bias.expand(-1, heads, -1)), (kv.positions, positions.int().expand(-1, heads, -1))]
    contents: list[tuple[torch.Tensor, torch.Tensor]] = []
    held = [(kv.keys, kv.key_scales, key), (kv.values, kv.value_scales, value)]
    if kv.value_min is not None and kv.value_max is not None:
        write_prefill_keys(kv, places, key, None if visible is None else hidden, rows)
        codes, low, high = raas_kernels.pack_values(value)
        contents += [(kv.value_min, low), (kv.value_max, high)]
        held = [(kv.values, None, codes)]
    for buffer, scales, states in held:
        if scales is not None:
            states, scale = raas_kernels.quantize(states, buffer.dtype)
            contents.append((scales, scale))
        contents.append((movable(buffer), movable(states)))
    segments = places.segments if rows is None and kv.blocks is None else None
    if kv.blocks is None:
        writes += contents
    if segments is not None:
        for buffer, states in writes:
            for tokens, slots in segments:
                buffer[:, :, slots] = states[:, :, tokens]
        return
    source, token, slot = (torch.from_numpy(index).to(device) for index in places.pairs())
    target = source if rows is None else rows.on_device[source]
    for buffer, states in writes:
        buffer[target, :, slot] = states[source, :, token]
    if kv.blocks is not None:
        block, lane = kv.blocks[target, slot // table.page_size].long(), slot % table.page_size
        for buffer, states in contents:
            buffer[block, :, lane] = states[source, :, token]


def _move_positions(table: PageTable, by: int, decoded: np.ndarray, rows: Rows | None) -> None:
    """Add `by` to the positions of the free slots of open pages: the positions of the tokens that will fill them.

    Args:
        decoded: `[rows]`, number of decode tokens of each row.
    """
    kv = table.kv
    assert kv is not None
    filled = decoded % table.page_size  # [rows]; 0 where no page is open
    if not filled.any():
        return
    index = slice(None) if rows is None else rows.on_device
    device_filled = torch.from_numpy(filled)[:, None, None].to(table.device)
    lane = torch.arange(table.page_size, device=table.device)
    slots = kv.open_slot[index][..., None] + lane  # [rows, kv_heads, page_size]
    is_free = (device_filled > 0) & (lane >= device_filled)
    positions = kv.positions[index]
    positions = positions.scatter_add(2, slots, (is_free.int() * by).expand_as(slots).contiguous())
    kv.positions[index] = positions


@allocating
def truncate(table: PageTable, seen: np.ndarray, drops_decoded: bool) -> None:
    """Take back the prefill tokens from position `seen` on. No decode token may follow them, unless it is dropped.

    Args:
        seen: `[batch]`, number of tokens of each row that stay.
        drops_decoded: whether to empty all evictable pages and set the number of decode tokens to 0.
    """
    table.check_no_pool("Taking tokens back (assisted decoding, crop, rewind)")
    kv, counts = table.kv, table.counts
    assert kv is not None
    size, pinned_pages = table.page_size, counts.pinned_pages
    gone = counts.seen - seen
    # 1. Slots: in pinned pages, the tokens from `seen` on; in evictable pages, all tokens or none.
    pinned = torch.from_numpy(counts.pinned).to(table.device).repeat_interleave(size, 1)[:, None]  # [batch, 1, slots]
    place = torch.from_numpy(seen).to(table.device)[:, None, None]
    emptied = pinned & (kv.positions >= place)
    if drops_decoded:
        emptied = emptied | ~pinned
        kv.priority.fill_(float("-inf"))
        if kv.states is not None:
            kv.states.zero_()
    else:
        for length in np.unique(gone):
            rows = Rows.from_list(np.flatnonzero(gone == length).tolist(), table.device)
            _move_positions(table, -int(length), counts.decoded[rows.on_host], rows)
    is_held = pinned & (kv.positions >= 0) & ~emptied
    prefilled = is_held[:, 0].sum(1).cpu().numpy()
    kv.bias.masked_fill_(emptied, float("-inf"))
    kv.positions.masked_fill_(emptied, -1)
    # 2. Counts.
    counts.seen, counts.prefilled = seen.copy(), prefilled
    counts.padding = np.minimum(counts.padding, seen)
    if drops_decoded:
        counts.decoded[:], counts.released[:] = 0, 0
        kv.clock[..., 1] = -1
        table.is_decoding = False
    kv.clock[..., 0] = torch.from_numpy(seen - 1).to(table.device)[:, None]
    table.tokens = table.length
    table.is_empty = not table.tokens
    # 3. Pages: the first pinned ones stay.
    kept = -(-prefilled // size)
    counts.pinned &= counts.pinned.cumsum(1) <= kept[:, None]
    fresh = counts.decoded == 0
    for row in np.flatnonzero(fresh):
        counts.limit[row] = table.limit_beside(int(kept[row]))
    if fresh.all():
        table.set_pages(
            max(int(n) + table.pages_to_allocate(0, int(limit)) for n, limit in zip(kept, counts.limit, strict=True))
        )
    else:
        holds = (kv.positions >= 0).unflatten(2, (-1, size)).any(3).any(1).any(0)  # [pages]
        end = int((holds.long() * torch.arange(1, table.num_pages + 1, device=table.device)).max())
        added = int((pinned_pages - kept).min())
        table.set_pages(max(table.num_pages - added, end))
    table.summarise()
