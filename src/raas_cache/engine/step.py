"""One decode step of one layer: the algorithm."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

import raas_kernels

from .policy import Pages
from .select import select_pages
from .summaries import mean_keys, value_range


if TYPE_CHECKING:
    from .attention_inputs import Expanded, Softmax
    from .layer_engine import LayerEngine

New = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Key and value `[rows, kv_heads, 1, head_dim]` of a new token, and `[rows]` bool, False where the mask hides it."""


def step(
    layer: LayerEngine, query: torch.Tensor, softmax: Softmax, new: New | None, expanded: Expanded | None = None
) -> torch.Tensor:
    """Append, select, attend and score, rank (RaaS, section 3; another policy makes it another method).

    Args:
        query: `[rows, heads, 1, head_dim]`.
        new: the token to store; None if it is stored already.
        expanded: for a latent, the keys and values that the model expanded from it, `[rows, heads, slots, head_dim]`.

    Returns:
        `[rows, heads, 1, value_dim]`.
    """
    table, policy, rows = layer.table, layer.policy, layer.row_index
    kv = table.kv
    assert kv is not None
    # 1. Append the token to the open page. If that page is full, first recycle the evictable page of the smallest
    #    priority, among equals the oldest. The open page's timestamp becomes the present step.
    if new is not None:
        raas_kernels.append(kv, *new, rows=rows, may_close=layer.closes_pages)
    read = kv if expanded is None else layer.expanded_kv(*expanded)
    # 2. Select the pages to read: all of them, or the pages of the highest bounds on q . k.
    bounds = layer.logit_bounds(read, query, softmax) if layer.has_key_bounds else None  # [rows, kv_heads, pages]
    selected = select_pages(table, bounds, rows) if bounds is not None and not layer.reads_all else None
    # 3. Attend. A page's score is the largest softmax weight on one of its tokens, or the sum of the weights.
    output, scores = raas_kernels.attend(
        read, query, softmax["scale"], selected=selected, softcap=softmax["softcap"], sinks=softmax["sinks"],
        page_score=policy.page_score, group_score=policy.group_score, rows=rows if read is kv else None,
    )  # fmt: skip
    # 4. Rank: the policy gives the pages new priorities. RaaS sets the timestamp of every page that is a milestone.
    if table.is_decoding:
        if layer.adjusts_scores:
            scores = layer.page_scores(scores, bounds, selected)
        rank(layer, scores, queries=1, query=query)
        if layer.tracer is not None:
            layer.tracer.note(table, scores, is_prefill=False)
    return output


def rank(layer: LayerEngine, scores: torch.Tensor, queries: int, query: torch.Tensor | None = None) -> None:
    """Let the policy update the priorities.

    Args:
        scores: `[rows, kv_heads, pages]`.
        queries: number of queries that the scores come from.
        query: `[rows, heads, 1, head_dim]`, the query of a decode step; None after a prefill.
    """
    table, rows, policy = layer.table, layer.row_index, layer.policy
    kv, limit = table.kv, table.limit
    assert kv is not None
    if rows is not None:
        kv, limit = layer.kv_of_rows(), limit[rows]
    state = {}
    if kv.states is not None:
        state = {name: kv.states[..., i] for i, name in enumerate(policy.state)}
    keys, ranges = partial(mean_keys, table, rows=rows), partial(value_range, table, rows=rows)
    row_state = {}
    if kv.row_states is not None:
        row_state = {name: kv.row_states[:, :, i] for i, name in enumerate(policy.row_state)}
    policy.on_scores(Pages(kv, scores, limit, queries, keys, ranges, state, row_state, query, layer.rotation))
    if layer.granularity == "layer":  # heads may differ if the policy uses keys
        kv.priority.copy_(kv.priority.mean(1, keepdim=True).expand_as(kv.priority))
    if rows is not None:
        layer.kv.priority[rows] = kv.priority
        if layer.kv.states is not None and kv.states is not None:
            layer.kv.states[rows] = kv.states
        if layer.kv.row_states is not None and kv.row_states is not None:
            layer.kv.row_states[rows] = kv.row_states
