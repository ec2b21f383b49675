"""Stamp in plain torch: the engine of CPU tensors, and the standard of the Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ...paged_kv import PagedKV, take_rows


def stamp(
    kv: PagedKV, scores: Tensor, alpha: float | None, top_ratio: float | None, rows: Tensor | None = None
) -> None:
    """See `raas_kernels.stamp`."""
    # 1. The milestone pages, [R, H, P].
    milestone = scores >= alpha if alpha is not None else _highest(kv, scores, top_ratio, rows)

    # 2. Their priority becomes the clock. One number for all rows costs three operators less than a tensor.
    clocks = [] if rows is not None or torch.compiler.is_compiling() else kv.clock[..., 0].flatten().tolist()
    if clocks and clocks.count(clocks[0]) == len(clocks):
        kv.priority.masked_fill_(milestone, clocks[0])
        return
    now = take_rows(kv.clock, rows)[..., :1].to(kv.priority.dtype)  # [R, H, 1]
    stamped = torch.where(milestone, now, take_rows(kv.priority, rows))
    if rows is None:
        kv.priority.copy_(stamped)
    else:
        kv.priority.index_copy_(0, rows, stamped)


def _highest(kv: PagedKV, scores: Tensor, top_ratio: float | None, rows: Tensor | None) -> Tensor:
    """Whether a page is among the `ceil(top_ratio * held)` highest scores of the held pages, `[R, H, P]` bool."""
    held = take_rows(kv.held, rows)
    by_age = take_rows(kv.first, rows).argsort(-1)
    scores_by_age = scores.masked_fill(~held, -1.0).gather(-1, by_age)
    ranked = by_age.gather(-1, scores_by_age.argsort(dim=-1, descending=True, stable=True))
    wanted = (held.sum(-1, keepdim=True).double() * top_ratio).ceil()  # type: ignore[operator]  # alpha is None
    in_top = torch.arange(scores.shape[-1], device=scores.device) < wanted
    return torch.zeros_like(held).scatter_(-1, ranked, in_top)
