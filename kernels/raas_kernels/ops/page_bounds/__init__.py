"""Page bounds: an upper bound of each page's logits from the bounds of its keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch import flatten, implementation, is_traceable, operator, unflatten
from ...paged_kv import PagedKV
from . import reference
from .reference import page_extremes, refresh_extremes


__all__ = ["page_extremes", "page_logit_bounds", "refresh_extremes"]


def page_logit_bounds(
    kv: PagedKV, query: Tensor, scale: float, softcap: float | None = None, rows: Tensor | None = None
) -> Tensor:
    """Upper bound of every page's logits from its key_min and key_max (Quest, section 3.3; RaaS, section 3).

    `bound[page] = max over the query group, sum over d, max(q_d * key_min_d, q_d * key_max_d) * scale`.

    Args:
        kv: read only. Without key_min and key_max, they are computed of the keys.
        query: `[R, H * G, 1, Dk]`; the G query heads of a KV head are consecutive.
        scale: factor on `q . k`.
        softcap: as in `attend`. tanh is monotone, so that a capped bound bounds the capped logits.
        rows: `[R]` int64, the batch rows to read; None for all.

    Returns:
        `[R, H, P]` float32 (float64 for float64 inputs); -inf for a page without a visible token.
    """
    if torch.compiler.is_compiling() and not is_traceable(query.device):
        bounds: Tensor = _page_logit_bounds(*flatten(kv), query, scale, softcap, rows)
        return bounds
    run = reference if torch.compiler.is_compiling() else implementation(__name__, query.device)
    bounds = run.page_logit_bounds(kv, query, scale, softcap, rows)
    return bounds


@operator("Tensor query, float scale, float? softcap, Tensor? rows", returns="Tensor")
def _page_logit_bounds(kv: PagedKV, query: Tensor, scale: float, softcap: float | None, rows: Tensor | None) -> Tensor:
    bounds: Tensor = implementation(__name__, query.device).page_logit_bounds(kv, query, scale, softcap, rows)
    return bounds


@_page_logit_bounds.register_fake
def _(*flat: Any) -> Tensor:
    kv, (query, *_) = unflatten(flat)
    bounds: Tensor = query.new_empty(query.shape[0], kv.bias.shape[1], kv.num_pages, dtype=kv.bias.dtype)
    return bounds
