"""The host's counts of each row: tokens seen, decoded and pinned, and which pages are pinned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Rows:
    """Some of a batch's rows.

    Args:
        on_host: int64 `[rows]`.
        on_device: int64 `[rows]`, for the kernels.
        is_known: False if only the device knows the rows, in a decode step that a CUDA graph repeats. `on_host` then
            has no meaning.
    """

    on_host: np.ndarray
    on_device: torch.Tensor
    is_known: bool = True

    @classmethod
    def from_list(cls, indices: list[int], device: torch.device) -> Rows:
        return cls(np.array(indices, np.int64), torch.tensor(indices, dtype=torch.int64, device=device))


@dataclass
class RowCounts:
    """Counts of each row of a batch.

    Args:
        seen: `[batch]`, tokens of the row so far, with evicted tokens and left padding.
        decoded: `[batch]`, decode tokens so far. With `prompt="evict"`, a user's turn closes the open page and rounds
            this number up to full pages.
        padding: `[batch]`, left padding, which counts as seen and is not stored.
        prefilled: `[batch]`, prefill tokens in pinned pages.
        released: `[batch]`, prefill pages that became evictable (`prompt="evict"`).
        limit: `[batch]`, number of evictable pages that the row may have.
        pinned: `[batch, pages]` bool, the pages that hold prefill and are never evicted.
    """

    seen: np.ndarray
    decoded: np.ndarray
    padding: np.ndarray
    prefilled: np.ndarray
    released: np.ndarray
    limit: np.ndarray
    pinned: np.ndarray

    @classmethod
    def empty(cls, batch_size: int) -> RowCounts:
        seen, decoded, padding, prefilled, released, limit = (np.zeros(batch_size, np.int64) for _ in range(6))
        return cls(seen, decoded, padding, prefilled, released, limit, np.zeros((batch_size, 0), bool))

    @property
    def pinned_pages(self) -> np.ndarray:
        """Pinned pages of each row, `[batch]`."""
        pages: np.ndarray = self.pinned.sum(1)
        return pages

    @property
    def are_alike(self) -> bool:
        """Whether all rows have the same counts."""
        return all(bool((counts == counts[:1]).all()) for counts in vars(self).values())

    @property
    def are_free(self) -> np.ndarray:
        """Which rows have no sequence, `[batch]` bool: no prompt has come since the row was created or released.

        A step over all rows counts in them, too, but their counts mean nothing.
        """
        free: np.ndarray = self.limit == 0
        return free

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens that the sequence of each row has, `[batch]`; 0 for a free row."""
        return np.where(self.are_free, 0, self.seen)

    @property
    def hold_nothing(self) -> np.ndarray:
        """Which rows hold no token, `[batch]` bool."""
        nothing: np.ndarray = self.prefilled + self.decoded + self.released == 0
        return nothing

    def clear(self, rows: np.ndarray) -> None:
        """Forget the rows `rows`."""
        for counts in vars(self).values():
            counts[rows] = 0

    def taken(self, index: np.ndarray) -> RowCounts:
        """The counts of the rows `index`, in that order."""
        return RowCounts(**{name: counts[index] for name, counts in vars(self).items()})

    def set_pages(self, pages: int) -> None:
        """Give `pinned` `pages` columns; new columns are False."""
        old = self.pinned
        self.pinned = np.zeros((len(old), pages), bool)
        self.pinned[:, : old.shape[1]] = old[:, :pages]
