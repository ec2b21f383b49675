"""One vector or number for each page, computed from its visible tokens when a policy asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import raas_kernels
from raas_kernels.paged_kv import take_rows


if TYPE_CHECKING:
    from collections.abc import Callable

    from .page_table import PageTable


def mean_keys(
    table: PageTable, of: Callable[[torch.Tensor], torch.Tensor] | None = None, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of the visible keys of each page, `[rows, kv_heads, pages, head_dim]`; 0 if no key is visible.

    Args:
        of: a function of a key, `[..., head_dim]` to `[..., n]`, whose mean is taken instead.
        rows: `[rows]` int64, the rows of the batch; None for all.
    """
    kv = table.kv
    assert kv is not None
    states = raas_kernels.key_states(kv, table.dtypes[0], rows)
    keys: torch.Tensor = (states if of is None else of(states)).unflatten(2, (-1, table.page_size))
    visible: torch.Tensor = (take_rows(kv.bias, rows) == 0).unflatten(2, (-1, table.page_size))[..., None]
    return keys.masked_fill(~visible, 0).sum(3) / visible.sum(3).clamp(min=1)


def value_range(table: PageTable, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Largest value range of the visible tokens of each page, `[rows, kv_heads, pages]`; 0 if no token is visible.

    The value range of a token is the largest minus the smallest component of its value. For a latent, it is taken from
    what the cache stores as value.
    """
    kv = table.kv
    assert kv is not None
    values = raas_kernels.value_states(kv, table.dtypes[1], rows)  # [rows, kv_heads, slots, value_dim]
    ranges = (values.amax(-1) - values.amin(-1)).masked_fill(take_rows(kv.bias, rows) != 0, 0)
    largest: torch.Tensor = ranges.unflatten(2, (-1, table.page_size)).amax(3)
    return largest
