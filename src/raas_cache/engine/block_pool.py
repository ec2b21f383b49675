"""The blocks of a pool: which of them are free, and which blocks hold the pages of each row."""

from __future__ import annotations

import numpy as np


class BlockPool:
    """The host's counts of a pool of blocks. A block may hold the same page of several rows.

    Block 0 is never given out: it is the block of a page that has no memory.

    Args:
        blocks: number of blocks, with block 0.

    Attributes:
        blocks: number of blocks that can be given out.
        free: number of blocks that are free.
        peak: largest number of blocks that were in use at once.
    """

    def __init__(self, blocks: int):
        self.blocks, self.peak = blocks - 1, 0
        self._uses = np.zeros(blocks, np.int64)  # how many pages lie in each block
        self._free = np.arange(blocks - 1, 0, -1, dtype=np.int32)  # the first `free` of them are free blocks
        self.free = len(self._free)

    def take(self, count: int) -> np.ndarray:
        """Take `count` free blocks, `[count]` int32. Each then holds one page.

        Raises:
            RuntimeError: fewer blocks are free. None is taken.
        """
        if count > self.free:
            raise RuntimeError(
                f"{count} blocks are needed, but only {self.free} of {len(self._free)} blocks are free: release a row "
                "first, or use a pool with more blocks."
            )
        taken = self._free[self.free - count : self.free].copy()
        self.free -= count
        self._uses[taken] = 1
        self.peak = max(self.peak, len(self._free) - self.free)
        return taken

    def share(self, ids: np.ndarray) -> None:
        """Note that one more page lies in each of the blocks `ids`, which are in use and differ."""
        assert (self._uses[ids] > 0).all(), f"blocks {ids[self._uses[ids] < 1]} are free"
        self._uses[ids] += 1

    def give_back(self, ids: np.ndarray) -> None:
        """Note that one page less lies in each of the blocks `ids`, which differ. A block without a page is free."""
        assert (self._uses[ids] > 0).all(), f"blocks {ids[self._uses[ids] < 1]} are free"
        self._uses[ids] -= 1
        freed = ids[self._uses[ids] == 0]
        self._free[self.free : self.free + len(freed)] = freed
        self.free += len(freed)


class RowBlocks:
    """The blocks of each row: the host's copy of `PagedKV.blocks`. The first pages of a row have memory, no others.

    Attributes:
        pool: the counts of the pool.
        ids: `[batch, pages]` int32, the block of each page; 0 for a page without memory.
    """

    def __init__(self, pool_blocks: int, batch_size: int):
        self.pool = BlockPool(pool_blocks)
        self.ids = np.zeros((batch_size, 0), np.int32)

    @property
    def reserved(self) -> np.ndarray:
        """Number of pages of each row that have memory, `[batch]`."""
        reserved: np.ndarray = (self.ids > 0).sum(1)
        return reserved

    def set_pages(self, pages: int) -> None:
        """Give `ids` `pages` columns; new columns are 0, and columns that go away must be 0."""
        old, self.ids = self.ids, np.zeros((len(self.ids), pages), np.int32)
        self.ids[:, : old.shape[1]] = old[:, :pages]

    def shrink(self, row: int, pages: int) -> None:
        """Give back the blocks of the pages of `row` from page `pages` on."""
        held = self.ids[row, pages:]
        self.pool.give_back(held[held > 0])
        self.ids[row, pages:] = 0
