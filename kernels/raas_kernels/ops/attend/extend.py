"""Extend: attention of several new tokens of each row. It is rare, so torch serves every device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contents import key_states, value_states
from ...paged_kv import PagedKV, resident, take_rows
from .reference import Reduction, cap, score_pages, softmax


def extend(
    kv: PagedKV,
    query: Tensor,
    query_positions: Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    page_score: Reduction = "max",
    group_score: Reduction = "max",
    observed: int | None = None,
    max_logits: int = 1 << 26,
    among: Tensor | None = None,
    heads_share: bool = False,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of T new tokens of each row over the cache and, causally, over each other; scores as in `attend`.

    The new tokens are in the cache already. A query sees every visible slot whose position is not past its own; with
    `among`, it sees the new tokens that `among` names. Queries are served in blocks, which bound the logits in memory.

    Args:
        kv: read only.
        query: `[R, H * G, T, Dk]`.
        query_positions: `[R, T]` or `[T]` int, sequence index of each query.
        scale, softcap, sinks, page_score, group_score: as in `attend`.
        observed: how many of the last queries give the scores; None for all. A query that the mask hides gives none.
        max_logits: bound on the number of logits in memory at once.
        among: `[R, T, new]` bool, which of the `new` newest tokens each query sees, in the order of their positions;
            the last one is at the row's last query position. None for causal.
        heads_share: reduce a query's scores over all KV heads, by `group_score`, before the scores of several queries
            are reduced.
        rows: `[R]` int64, the batch rows to read; None for all.

    Returns:
        output `[R, H * G, T, Dv]` in the query's dtype, and scores `[R, H, P]`: over the queries their max if
        `page_score` is `"max"`, otherwise their sum.
    """
    bias, positions = take_rows(kv.bias, rows), take_rows(kv.positions, rows)
    batch, heads, slots = bias.shape
    length, size = query.shape[2], kv.page_size
    accumulate = torch.promote_types(query.dtype, torch.float32)
    tokens = query_positions.expand(batch, length)

    # 1. Keys [R, H, 1, Dk, N] and values [R, H, 1, N, Dv], decoded and in the dtype of the logits.
    keys = key_states(kv, accumulate, rows)[:, :, None].mT
    values = value_states(kv, accumulate, rows)[:, :, None]
    grouped = query.reshape(batch, heads, -1, length, query.shape[-1])  # [R, H, G, T, Dk]
    if sinks is not None:
        sinks = sinks.view(heads, -1, 1, 1)
    output = query.new_empty(*grouped.shape[:-1], values.shape[-1])
    scores = torch.zeros(batch, heads, slots // size, dtype=accumulate, device=query.device)

    block = max(1, max_logits // (batch * query.shape[1] * slots))
    first_observed = 0 if observed is None else length - observed
    for start in range(0, length, block):
        window = slice(start, min(start + block, length))
        # 2. Logits [R, H, G, block, N] and what each query may see of them.
        logits = cap(grouped[:, :, :, window].to(accumulate) * scale @ keys, softcap)
        allowed = _allowed(positions, tokens, window, among)
        visible = (bias == 0)[:, :, None] & allowed  # [R, H, block, N]
        # 3. Weights and output. A query that sees nothing has softmax 0 / 0, and nobody uses its output.
        weights = softmax(logits.masked_fill_(~visible[:, :, None], float("-inf")), sinks).nan_to_num_(0.0)
        output[:, :, :, window] = (weights @ values).to(query.dtype)
        # 4. Scores of the observed queries of this block.
        counted = slice(max(start, first_observed), window.stop)
        if counted.start < counted.stop:
            weights = weights[:, :, :, counted.start - start :]
            weights = weights * resident(kv, tokens[:, counted], rows)[:, :, None, :, None]
            by_query = weights.permute(0, 1, 3, 2, 4).flatten(0, 2)  # [R * H * block, G, N]
            by_query = score_pages(by_query, size, page_score, group_score).unflatten(0, (batch, heads, -1))
            if heads_share:
                over_heads = torch.amax if group_score == "max" else torch.mean
                by_query = over_heads(by_query, 1, keepdim=True).expand_as(by_query)
            if page_score == "max":
                torch.maximum(scores, by_query.amax(2), out=scores)
            else:
                scores += by_query.sum(2)
    return output.view(batch, -1, length, values.shape[-1]), scores


def _allowed(positions: Tensor, tokens: Tensor, window: slice, among: Tensor | None) -> Tensor:
    """Whether the queries of `window` may see each slot, `[R, H, block, N]`, whatever the attention mask hides."""
    if among is None:
        return positions[:, :, None] <= tokens[:, None, window, None]
    new = among.shape[-1]
    # A slot's index among the new tokens; negative for older tokens. An empty slot may have any position.
    place = (positions - tokens[:, None, -1:] - 1 + new)[:, :, None]  # [R, H, 1, N]
    index = place.clamp(0, new - 1).long().expand(-1, -1, window.stop - window.start, -1)
    seen = among[:, None, window].expand(-1, positions.shape[1], -1, -1).gather(3, index)
    return (place < 0) | seen
