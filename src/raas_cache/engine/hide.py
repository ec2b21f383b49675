"""Hide tokens that are stored already: by a mask of earlier tokens, or of a latent (MLA), which comes after them."""

from __future__ import annotations

import torch

import raas_kernels
from raas_kernels import PagedKV

from .page_table import PageTable
from .resize import movable
from .row_counts import Rows


def check_same_length(visible: torch.Tensor, table: PageTable, rows: Rows | None) -> None:
    """Refuse a mask that hides tokens of rows that started at different steps.

    Args:
        visible: `[rows, tokens]` bool, or `[1, tokens]` for all rows. Column i is the token i of the sequence, which is
            another token in each row if the rows have seen different numbers of tokens.
        rows: the rows that the forward touches; None for all. What the mask says of a free row does not matter.

    Raises:
        ValueError: the rows have seen different numbers of tokens, and the mask hides a token.
    """
    counts, index = table.counts, slice(None) if rows is None else rows.on_host
    is_held, seen = ~counts.are_free[index], counts.lengths[index]
    held = seen[is_held]
    if (held == held[:1]).all():
        return
    told = visible if len(visible) == 1 else visible[torch.from_numpy(is_held).to(visible.device)]
    if not bool(told.all()):
        raise ValueError(
            f"attention_mask hides tokens, but its rows have seen {', '.join(map(str, seen))} tokens, so its columns "
            "stand for different tokens in each row. Pass no attention_mask for rows that started at different steps, "
            "or run each row by itself, with its own mask, inside cache.on_rows."
        )


def hide_newest(table: PageTable, visible: torch.Tensor, rows: Rows | None) -> None:
    """Hide the newest stored tokens of `rows` where `visible` `[rows, new]` is False."""
    kv = table.kv
    assert kv is not None
    index = slice(None) if rows is None else rows.on_device
    new, positions = visible.shape[1], kv.positions[index]  # [rows, kv_heads, slots]
    nth = positions - (kv.clock[index][..., :1] + 1 - new)
    shown = visible[:, None].expand(-1, table.num_heads, -1).gather(-1, nth.clamp(min=0, max=new - 1).long())
    hidden = torch.zeros_like(kv.bias, dtype=torch.bool)
    hidden[index] = (nth >= 0) & (nth < new) & ~shown
    kv.bias.masked_fill_(hidden, float("-inf"))
    _make_finite(kv, hidden)
    table.summarise()


def hide_decoded(table: PageTable, visible: torch.Tensor, rows: Rows | None) -> None:
    """Hide the newest decode token of `rows` where `visible` `[rows]` is False."""
    kv = table.kv
    assert kv is not None
    slot = (kv.open_slot + kv.clock[..., 1] % table.page_size)[..., None]
    lane = torch.arange(kv.bias.shape[2], device=table.device)
    is_hidden = ~visible.expand(table.batch_size if rows is None else len(rows.on_host))
    if rows is not None:
        is_hidden = torch.zeros(table.batch_size, dtype=torch.bool, device=table.device).index_copy(
            0, rows.on_device, is_hidden
        )
    hidden = (lane == slot) & is_hidden[:, None, None]  # [batch, kv_heads, slots]
    kv.bias.copy_(torch.where(hidden, float("-inf"), kv.bias))
    _make_finite(kv, hidden)


def _make_finite(kv: PagedKV, hidden: torch.Tensor) -> None:
    """Clear the NaNs and infinities of `hidden` slots `[batch, kv_heads, slots]`, see `raas_kernels.finite`."""
    for buffer, scales in ((kv.keys, kv.key_scales), (kv.values, kv.value_scales)):
        if scales is None:
            buffer.copy_(raas_kernels.finite(buffer, hidden[..., None]))
        else:  # if a token is not finite, its scale is not finite
            bad = hidden & ~scales.isfinite()
            movable(buffer).copy_(torch.where(bad[..., None], 0, movable(buffer)))
            scales.copy_(torch.where(bad, 0, scales))
