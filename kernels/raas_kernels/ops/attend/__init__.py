"""Attend: attention over the pages of a cache, with a score of each page from the same softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch import flatten, implementation, is_traceable, operator, unflatten
from ...paged_kv import PagedKV
from . import reference
from .extend import extend
from .reference import Reduction


__all__ = ["Reduction", "attend", "extend"]


def attend(
    kv: PagedKV,
    query: Tensor,
    scale: float,
    *,
    selected: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    page_score: Reduction = "max",
    group_score: Reduction = "max",
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one token of each row over every visible token, and each page's score from the same softmax.

    With both reductions `"max"`: `score[page] = max over the query group, max over the page's tokens,
    softmax(q . k * scale)` (RaaS, section 3).

    Args:
        kv: read only.
        query: `[R, H * G, 1, Dk]`; the G query heads of a KV head are consecutive.
        scale: factor on `q . k`.
        selected: `[R, H, K]` int64, the pages to read, no other is; -1 reads no page at its place. None reads all.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2); None leaves them.
        sinks: `[H * G]`, one more logit in each query head's softmax, without a value behind it (gpt-oss); or None.
        page_score: a page's score for one query head: `"max"` or `"sum"` of the head's weights on the page's tokens.
        group_score: the page's score: `"max"` or `"mean"` of its scores over the query group.
        rows: `[R]` int64, the batch rows to read; None for all.

    Returns:
        output `[R, H * G, 1, Dv]` in the query's dtype, and scores `[R, H, P]` float32 (float64 for float64 inputs).
        With `selected`, the scores are `[R, H, K]`, in its order, 0 for -1. The output of a row without a visible token
        is NaN, and its scores have no meaning.
    """
    if torch.compiler.is_compiling() and not is_traceable(query.device):
        result: tuple[Tensor, Tensor] = _attend(
            *flatten(kv), query, scale, selected, softcap, sinks, page_score, group_score, rows
        )
        return result
    run = reference if torch.compiler.is_compiling() else implementation(__name__, query.device)
    result = run.attend(
        kv, query, scale, selected=selected, softcap=softcap, sinks=sinks, page_score=page_score,
        group_score=group_score, rows=rows,
    )  # fmt: skip
    return result


@operator(
    "Tensor query, float scale, Tensor? selected, float? softcap, Tensor? sinks, str page_score, str group_score, "
    "Tensor? rows",
    returns="(Tensor, Tensor)",
)
def _attend(
    kv: PagedKV, query: Tensor, scale: float, selected: Tensor | None, softcap: float | None, sinks: Tensor | None,
    page_score: Reduction, group_score: Reduction, rows: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    result: tuple[Tensor, Tensor] = implementation(__name__, query.device).attend(
        kv, query, scale, selected=selected, softcap=softcap, sinks=sinks, page_score=page_score,
        group_score=group_score, rows=rows,
    )  # fmt: skip
    return result


@_attend.register_fake
def _(*flat: Any) -> tuple[Tensor, Tensor]:
    kv, (query, _, selected, *_) = unflatten(flat)
    pages = kv.num_pages if selected is None else selected.shape[2]
    output = query.new_empty(*query.shape[:3], kv.value_size)
    return output, query.new_empty(query.shape[0], kv.bias.shape[1], pages, dtype=kv.bias.dtype)
