"""The page table of one attention layer: which slot holds which token, for each row. It computes no attention."""

from __future__ import annotations

import sys

import numpy as np
import torch

import raas_kernels
from raas_kernels import PagedKV

from .block_pool import RowBlocks
from .layer_settings import LayerSettings
from .layout import Layout
from .resize import CONTENTS, RowFunction, allocating, fix_addresses, in_a_pool, map_rows, movable, new_kv, resized
from .row_counts import RowCounts, Rows
from .traced import is_capturing


FIRST_TOKENS = 128  # a layer starts with evictable pages for this many tokens, and allocates more when it needs them
UNLIMITED = sys.maxsize
NOT_PREALLOCATED = (
    "This cache allocates memory while the chain grows, which a compiled step cannot do: call cache.preallocate() "
    "before the first forward. (generate does this itself if it compiles.)"
)
NOT_RESERVED = (
    "Row {row} has reserved {reserved} pages, but needs {needed}: reserve as many pages as its prompt and its decode "
    "tokens need before its first forward."
)


class PageTable:
    """One layer's KV in pages of `page_size` tokens, in one region of pages for each row.

    The prefill of a row is in pinned pages, its decode tokens are in evictable pages. Each row has its own counts: a
    row with a shorter prompt has more evictable pages. Pages are allocated when a row needs them, up to the `limit` of
    the row. After that, `raas_kernels.append` recycles pages in place. A policy that never evicts has no limit.

    A decode step writes into buffers that keep their address, and advances the clock on the device, so that a compiled
    step or a CUDA graph can repeat without the host. The `counts` on the host are updated when they are read.

    With `use_pool`, keys and values lie in a pool of blocks, which all rows share and which is allocated once. A row
    has the pages that `raas_cache.engine.reserve.reserve` took for it, and needs no more memory until it is released.

    A method that changes sizes allocates all new buffers before it assigns the first. If memory runs out, nothing has
    changed.

    Attributes:
        kv: the buffers; None while the table is empty.
        limit: `[batch, 1, 1]` int64 on the device, number of evictable pages that each row may have.
        pages_read: largest number of pages of a row that a decode step reads. If the number differs between rows,
            `pages_read_by_row` `[batch, 1, 1]` int64 has the number of each row, otherwise it is None.
        tokens: number of tokens of all forwards so far, without compiled steps. The cache compares it between layers.
        quiet_steps: number of decode steps of all rows before `before_decode` must be called again. Each such step
            counts it down by one.
        signature: rows, KV heads, head sizes, dtypes and device of the keys and values that the table accepts.
        preallocates: whether all pages are allocated at once, which a compiled step needs.
        pool_blocks: number of blocks of the pool, with block 0, which holds nothing; None without a pool.
        blocks: the blocks of each row; None without a pool, and before the first allocation.
    """

    kv: PagedKV | None
    limit: torch.Tensor
    pages_read_by_row: torch.Tensor | None
    dtypes: tuple[torch.dtype, torch.dtype]  # of the keys and values that the model computes
    signature: tuple[int, int, int, int, torch.dtype, torch.dtype, torch.device]
    device: torch.device

    def __init__(self, settings: LayerSettings):
        self.settings, self.page_size = settings, settings.page_size
        self.preallocates = False
        self.pool_blocks: int | None = None
        self.release()

    def release(self) -> None:
        """Empty the table and release its memory."""
        self.kv, self.pages_read_by_row, self.pages_read = None, None, 0
        self.blocks: RowBlocks | None = None
        self.limit = torch.empty(0, 1, 1, dtype=torch.int64)
        self.batch_size = self.num_heads = self.tokens = 0
        self._counts = RowCounts.empty(0)
        self._granted = self.quiet_steps = 0
        self._is_behind = False  # whether compiled steps have advanced the clock on the device
        self.is_empty = True  # whether no forward came, or all tokens were taken back
        self.is_decoding = False  # whether a decode token was ever stored
        self.is_full_size = False  # whether no row will need more pages

    def use_pool(self, pool_blocks: int) -> None:
        """Keep the keys and values of all rows in a pool of `pool_blocks` blocks, which is allocated with the buffers.

        A block holds one page of one row, for all its KV heads. Block 0 holds nothing. `reserve` takes blocks for a row
        before its first forward.
        """
        assert self.kv is None, "call use_pool before the buffers are allocated"
        self.pool_blocks = pool_blocks

    def check_no_pool(self, what: str) -> None:
        """Raise a RuntimeError if the pages lie in a pool, which does not support `what`."""
        if self.pool_blocks is not None:
            raise RuntimeError(
                f"{what} is not supported by a cache whose rows share a pool of pages: use a cache without a pool."
            )

    @allocating
    def allocate(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        batch_size: int,
        contents: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Create buffers without pages for the first key and value; the first prefill adds the pages.

        Args:
            key, value: `[rows, kv_heads, new, head_dim]`.
            batch_size: number of rows to allocate.
            contents: keys and values of the pool, `[blocks, kv_heads, page_size, head_dim]`; None to allocate them.

        Raises:
            ValueError: the device cannot compute in the layer's 8-bit dtype, or 4-bit codes cannot store a head size.
        """
        heads, device = key.shape[1], key.device
        kv = new_kv(self.settings, key, value, batch_size)
        self.kv = kv if self.pool_blocks is None else in_a_pool(kv, self.pool_blocks, contents)
        self.blocks = None if self.pool_blocks is None else RowBlocks(self.pool_blocks, batch_size)
        self.dtypes, self.device = (key.dtype, value.dtype), device
        self.batch_size, self.num_heads = batch_size, heads
        self.signature = batch_size, heads, key.shape[-1], value.shape[-1], key.dtype, value.dtype, device
        self._counts = RowCounts.empty(batch_size)

    # Counts.

    @property
    def counts(self) -> RowCounts:
        """The counts of each row. After compiled steps, this reads the clock on the device."""
        if self._is_behind:
            assert self.kv is not None
            clock = (self.kv.clock[:, 0] + 1).cpu().numpy()  # [batch, 2]
            self._counts.seen, self._counts.decoded = clock[:, 0].copy(), clock[:, 1].copy()
            self._is_behind, self._granted, self.quiet_steps = False, 0, 0
        uncounted = self._granted - self.quiet_steps
        if uncounted:
            self._counts.seen += uncounted
            self._counts.decoded += uncounted
            self._granted = self.quiet_steps
        return self._counts

    @property
    def num_pages(self) -> int:
        """Pages allocated for each row and KV head."""
        return 0 if self.kv is None else self.kv.num_pages

    @property
    def length(self) -> int:
        """Number of tokens seen, in the row that has seen the most."""
        return int(self.counts.lengths.max(initial=0))

    def has_decoded(self, rows: Rows | None) -> bool:
        """Whether one of `rows` has a decode token."""
        return self.is_decoding and (rows is None or bool(self.counts.decoded[rows.on_host].any()))

    def length_of(self, rows: Rows | None) -> int:
        """Number of tokens seen, in the row of `rows` that has seen the most."""
        return self.length if rows is None else int(self.counts.lengths[rows.on_host].max(initial=0))

    @property
    def opened(self) -> np.ndarray:
        """Number of evictable pages that each row has opened so far, `[batch]`."""
        counts = self.counts
        opened: np.ndarray = counts.released + -(-counts.decoded // self.page_size)
        return opened

    @property
    def evicted(self) -> np.ndarray:
        """Number of pages that each row has evicted so far, in each of its KV heads, `[batch]`; 0 for a free row."""
        counts = self.counts
        evicted: np.ndarray = np.where(counts.are_free, 0, (self.opened - counts.limit).clip(0))
        return evicted

    @property
    def is_over_budget(self) -> bool:
        """Whether a row's prefill leaves less room than `min_decode_pages`, so that it holds more than the budget."""
        settings = self.settings
        if settings.grows or self.kv is None:
            return False
        least = min((settings.room_beside(int(pages)) for pages in self.counts.pinned_pages), default=UNLIMITED)
        return least < settings.min_decode_pages

    def check_same_use(self, key: torch.Tensor, value: torch.Tensor, rows: Rows | None) -> None:
        """Raise a ValueError if rows, heads, head sizes, dtypes or device differ from the stored tokens."""
        expected = (self.batch_size if rows is None else len(rows.on_device), *self.signature[1:])
        given_batch, heads, _, head_size = key.shape
        given = (given_batch, heads, head_size, value.shape[-1], key.dtype, value.dtype, key.device)
        if expected == given:
            return
        names = ("batch size", "KV heads", "head size", "head size of values", "dtype", "dtype of values", "device")
        for name, old, new in zip(names, expected, given, strict=True):
            if old != new:
                raise ValueError(
                    f"This cache holds {self.length} tokens with {name} {old}, but the new keys have {name} {new}: use "
                    "a new cache for another input, or call cache.reset() first."
                )

    # Sizes.

    def limit_beside(self, pinned_pages: int) -> int:
        """Number of evictable pages that a row with `pinned_pages` pinned pages may have."""
        if self.settings.grows:
            return UNLIMITED
        room = max(self.settings.room_beside(pinned_pages), self.settings.min_decode_pages)
        return max(1, round(room * self.settings.shares[0]))

    def pages_to_allocate(self, needed: int, limit: int) -> int:
        """Number of evictable pages to allocate if `needed` are needed now: 1.5 times as many, at most `limit`."""
        if self.preallocates and not self.settings.grows:
            return limit
        return min(limit, max(needed + needed // 2, FIRST_TOKENS // self.page_size, 1))

    @allocating
    def resize(self, pages: int) -> None:
        """Change the number of pages of each row to `pages`. Call `lay_out` before the next decode step."""
        assert self.kv is not None
        if pages != self.kv.num_pages:
            self.kv = resized(self.kv, pages)
            self.counts.set_pages(pages)
            if self.blocks is not None:
                self.blocks.set_pages(pages)

    def set_pages(self, pages: int) -> None:
        """Change the number of pages of each row to `pages`, and lay them out."""
        self.resize(pages)
        self.lay_out()

    @allocating
    def lay_out(self) -> None:
        """Write to the device where the pages of each row are, which it may recycle, and how many a step reads."""
        kv, counts = self.kv, self.counts
        assert kv is not None
        layout = Layout.of(counts, self.settings, None if self.blocks is None else self.blocks.reserved)
        if self.blocks is not None:
            blocks = torch.from_numpy(self.blocks.ids).to(self.device)
            if kv.blocks is not None and kv.blocks.shape == blocks.shape:
                kv.blocks.copy_(blocks)  # a CUDA graph may read it
            else:
                kv.blocks = blocks.clone()  # on a CPU, `blocks` and `ids` are the same memory
        evictable, limit, reads = (
            torch.from_numpy(array).to(self.device)
            for array in (layout.evictable, counts.limit[:, None, None].copy(), layout.reads[:, None, None].copy())
        )
        if kv.evictable.shape == evictable.shape and len(self.limit) == self.batch_size:
            kv.evictable.copy_(evictable)  # a CUDA graph may read it
            self.limit.copy_(limit)
        else:
            kv.evictable, self.limit = evictable, limit
        self.pages_read = min(int(layout.reads.max(initial=0)), kv.num_pages)
        if (layout.reads == layout.reads[:1]).all():
            self.pages_read_by_row = None
        elif self.pages_read_by_row is not None and self.pages_read_by_row.shape == reads.shape:
            self.pages_read_by_row.copy_(reads)  # a CUDA graph may read it
        else:
            self.pages_read_by_row = reads
        self.is_full_size = layout.is_full_size
        self._grant(0)
        fix_addresses(kv)

    # Decode tokens.

    def before_decode(self, rows: Rows | None = None) -> None:
        """Count one decode token in each of `rows`, and allocate more pages if a row opens a page that does not exist.

        Raises:
            RuntimeError: the step is compiled, and a row may need a page that is not allocated. Or a row opens a page
                that it has not reserved in the pool; a compiled step recycles a page instead.
        """
        if torch.compiler.is_compiling() or is_capturing() or not (rows is None or rows.is_known):
            if not (self.is_full_size or self.blocks is not None):
                raise RuntimeError(NOT_PREALLOCATED)
            self.clock_moved()
            return
        counts, touched = self.counts, slice(None) if rows is None else rows.on_host
        if not self.is_full_size:
            self._make_room(touched)
        self.tokens += 1
        counts.seen[touched] += 1
        counts.decoded[touched] += 1
        self.is_decoding = True
        self._grant(UNLIMITED if self.is_full_size else int((-counts.decoded % self.page_size).min()))

    def clock_moved(self) -> None:
        """Note that a compiled step or a CUDA graph has advanced the clock on the device."""
        self._is_behind = self.is_decoding = True

    def _grant(self, steps: int) -> None:
        self._granted = self.quiet_steps = steps

    def _make_room(self, touched: slice | np.ndarray) -> None:
        counts, pages = self._counts, 0
        opening = np.zeros(self.batch_size, bool)
        opening[touched] = counts.decoded[touched] % self.page_size == 0
        if self.blocks is not None:
            reserved = self.blocks.reserved
            decode_pages = reserved - counts.pinned_pages
            for row in np.flatnonzero(opening & (self.opened >= decode_pages) & (counts.limit > decode_pages))[:1]:
                raise RuntimeError(NOT_RESERVED.format(row=row, reserved=reserved[row], needed=reserved[row] + 1))
            return
        for row in np.flatnonzero(opening | self.preallocates):
            limit, pinned_pages = int(counts.limit[row]), int(counts.pinned_pages[row])
            allocated = self.num_pages - pinned_pages
            if self.preallocates or (allocated < limit and self.opened[row] >= allocated):
                pages = max(pages, pinned_pages + self.pages_to_allocate(allocated + 1, limit))
        if pages > self.num_pages:
            self.set_pages(pages)

    def move_clock(self, seen: int, decoded: int) -> None:
        """Add `seen` and `decoded`, which may be negative, to the counts and clocks of all rows."""
        assert self.kv is not None
        counts = self.counts
        counts.seen += seen
        counts.decoded += decoded
        self.tokens = self.length
        self.is_empty = not self.tokens
        self.kv.clock[..., 0] += seen
        self.kv.clock[..., 1] += decoded
        self.is_decoding = bool(counts.decoded.any())
        self._grant(0)

    # Contents.

    def states(self, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all slots in the dtypes of the model, `[rows, kv_heads, slots, head_dim]`.

        Args:
            rows: `[rows]` int64, the rows of the batch; None for all.
        """
        kv, (key_dtype, value_dtype) = self.kv, self.dtypes
        assert kv is not None
        return raas_kernels.key_states(kv, key_dtype, rows), raas_kernels.value_states(kv, value_dtype, rows)

    def summarise(self) -> None:
        """Compute `key_min` and `key_max` again, see `raas_kernels.refresh_extremes`."""
        assert self.kv is not None
        raas_kernels.refresh_extremes(self.kv)

    # Rows.

    @allocating
    def apply_to_rows(self, function: RowFunction) -> None:
        """Replace the rows of every buffer by the rows that `function` returns for them."""
        self.check_no_pool("Moving rows (beam search, reorder_cache)")
        if self.kv is None:
            return
        kv, counts = map_rows(self.kv, function), self.counts
        batch = kv.keys.shape[0]
        if not (batch == self.batch_size and counts.are_alike):
            index = function(torch.arange(self.batch_size, device=self.device)).cpu().numpy()
            counts = counts.taken(index)
        self.kv, self._counts, self.batch_size = kv, counts, batch
        self.signature = batch, *self.signature[1:]
        self.lay_out()

    def release_rows(self, rows: Rows) -> None:
        """Empty `rows`, so that other sequences can start there. They give the blocks that they reserved back."""
        kv = self.kv
        assert kv is not None
        self.counts.clear(rows.on_host)
        index = rows.on_device
        contents = [kv.open_keys, *(getattr(kv, name) for name in CONTENTS if self.blocks is None)]
        if kv.is_packed:  # the codes count from these bounds, also in empty pages
            contents += [kv.key_min, kv.key_max]
        for held in contents:
            if held is not None:  # attention multiplies what is hidden by 0, which leaves NaN as it is
                movable(held)[index] = 0
        kv.bias[index], kv.positions[index] = float("-inf"), -1
        kv.priority[index], kv.open_slot[index], kv.clock[index] = float("-inf"), 0, -1
        if self.blocks is not None:  # `reserve` clears the blocks for the rows that take them
            for row in rows.on_host:
                self.blocks.shrink(row, 0)
        self.lay_out()
