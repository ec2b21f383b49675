"""The four paged operations in plain torch: the CPU engine, and what the Triton kernels are checked against.

A layer's store is a set of static buffers, written in place (shapes as in the package docstring):

    keys        [B, H, N, Dk]   one page = S consecutive slots; K has RoPE applied, so slots need no order
    values      [B, H, N, Dv]
    bias        [B, H, N]       float32 (float64 for float64 keys): 0 where a token is resident, -inf where none is
    positions   [B, H, N]       int32, sequence index of the token in a slot; meaningless where the bias is -inf
    priority    [B, H, E]       float64, page with the smallest value is evicted first; -inf = holds nothing
    open_slot   [B, H]          int64, first slot of the decode page that takes the next token
    clock       [2]             int64, (sequence index, decode-token index) of the present token
    minima, maxima [B, H, P, Dk]  element-wise bounds of each page's keys (only for min/max scoring)
"""

import torch


def victim(positions: torch.Tensor, priority: torch.Tensor, page_size: int) -> torch.Tensor:
    """The page that `append` recycles next: the smallest `(priority, first sequence index)`, so an empty page first.

    Returns:
        `[B, H]` int64, index among the E decode pages.
    """
    first = positions[..., positions.shape[-1] - priority.shape[-1] * page_size :: page_size]
    # An empty page has no first token; among equals the leftmost is taken, by argmin here and in Triton.
    oldest = priority == priority.amin(-1, keepdim=True)
    return first.masked_fill(~oldest, torch.iinfo(first.dtype).max).argmin(-1)


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    positions: torch.Tensor,
    priority: torch.Tensor,
    open_slot: torch.Tensor,
    clock: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    page_size: int,
    minima: torch.Tensor | None = None,
    maxima: torch.Tensor | None = None,
) -> None:
    """Write one decode token a row into the open page; when that is full, first recycle the victim page in place.

    A page's priority becomes the present sequence index when the page opens and when its last slot is filled: until
    then it cannot be a victim, so this is "the open page's timestamp becomes t" at every token (RaaS, section 3).

    Args:
        key, value: `[B, H, 1, Dk]` and `[B, H, 1, Dv]`, dtype of `keys` / `values`.
        page_size: S, tokens a page.
        minima, maxima: bounds to keep up to date, or None.
    """
    now, decoded = clock.tolist()
    offset = decoded % page_size
    first_decode_slot = keys.shape[2] - priority.shape[-1] * page_size
    if offset == 0:
        torch.add(victim(positions, priority, page_size) * page_size, first_decode_slot, out=open_slot)
        lane = torch.arange(page_size, device=keys.device)
        page = open_slot[..., None] + lane
        bias.scatter_(2, page, float("-inf"))
        positions.scatter_(2, page, (now + lane).int().expand_as(page))
    slot = (open_slot + offset)[..., None]
    keys.scatter_(2, slot[..., None].expand(-1, -1, -1, keys.shape[-1]), key)
    values.scatter_(2, slot[..., None].expand(-1, -1, -1, values.shape[-1]), value)
    bias.scatter_(2, slot, 0)
    if offset in (0, page_size - 1):
        priority.scatter_(2, (open_slot[..., None] - first_decode_slot) // page_size, now)
    if minima is not None:
        page = (open_slot // page_size)[..., None, None].expand_as(key)
        for bounds, fold in ((minima, torch.minimum), (maxima, torch.maximum)):
            bounds.scatter_(2, page, key if offset == 0 else fold(bounds.gather(2, page), key))


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    page_size: int,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one decode token a row over every resident token, and each page's score from the same softmax.

    `score[page] = max over the query group, max over the page's tokens, softmax(q . k * scale)` (RaaS, section 3).

    Args:
        query: `[B, H * G, 1, Dk]`; the G query heads of a KV head are consecutive.
        scale: factor on `q . k`.
        page_size: S, tokens a page.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2), or None.
        sinks: `[H * G]`, one more logit in each query head's softmax, with nothing behind it (gpt-oss), or None.

    Returns:
        output `[B, H * G, 1, Dv]` in the query's dtype, scores `[B, H, P]` float32 (float64 for float64 inputs).
    """
    batch, heads, slots, _ = keys.shape
    accumulate = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(batch * heads, -1, query.shape[-1]).to(accumulate)
    # baddbmm and bmm, not @: on the CPU matmul copies the strided K and V, at twice the time of the whole attention.
    transposed, contents = keys.flatten(0, 1).to(accumulate).mT, values.flatten(0, 1).to(accumulate)
    if softcap is None:
        logits = torch.baddbmm(bias.view(-1, 1, slots), grouped, transposed, alpha=scale)
    else:
        logits = _capped(torch.bmm(grouped, transposed) * scale, softcap) + bias.view(-1, 1, slots)
    if sinks is not None:
        sinks = sinks.view(1, heads, -1, 1).expand(batch, -1, -1, -1).reshape(batch * heads, -1, 1)
    weights = _softmax(logits, sinks)
    output = torch.bmm(weights, contents).to(query.dtype)
    scores = weights.amax(1).view(batch, heads, -1, page_size).amax(-1)
    return output.view(batch, -1, 1, values.shape[-1]), scores


def _capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else (logits / softcap).tanh_() * softcap


def _softmax(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    if sinks is None:
        return logits.softmax(-1)
    return torch.cat([logits, sinks.to(logits.dtype).expand(*logits.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


def extend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    positions: torch.Tensor,
    query_positions: torch.Tensor,
    scale: float,
    page_size: int,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    max_logits: int = 1 << 26,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of T new tokens a row over the residents and, causally, over each other; scores as in `attend`.

    The new tokens are resident already: a query sees the slots whose position is not past its own. Rare (a new user
    turn, a prefill chunk), so torch serves every device, in blocks of queries that bound the logits in memory.

    Args:
        query: `[B, H * G, T, Dk]`.
        query_positions: `[T]` int, sequence index of each query.
        max_logits: bound on the logits held at once, in elements.

    Returns:
        output `[B, H * G, T, Dv]`, scores `[B, H, P]`, the max over the T queries too.
    """
    batch, heads, slots, _ = keys.shape
    length = query.shape[2]
    accumulate = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(batch, heads, -1, length, query.shape[-1])
    block = max(1, max_logits // (batch * query.shape[1] * slots))
    output = query.new_empty(*grouped.shape[:-1], values.shape[-1])
    scores = torch.zeros(batch, heads, slots // page_size, dtype=accumulate, device=query.device)
    transposed, contents = keys[:, :, None].mT.to(accumulate), values[:, :, None].to(accumulate)
    if sinks is not None:
        sinks = sinks.view(heads, -1, 1, 1)
    for start in range(0, length, block):
        window = slice(start, start + block)
        logits = _capped(grouped[:, :, :, window].to(accumulate) * scale @ transposed, softcap)
        visible = (bias == 0)[:, :, None] & (positions[:, :, None] <= query_positions[window, None])
        # A padding query sees nothing: its row of the softmax is 0 / 0, and its output is never used.
        weights = _softmax(logits.masked_fill_(~visible[:, :, None], float("-inf")), sinks).nan_to_num_(0.0)
        output[:, :, :, window] = (weights @ contents).to(query.dtype)
        torch.maximum(scores, weights.amax((2, 3)).view(*scores.shape, page_size).amax(-1), out=scores)
    return output.view(batch, -1, length, values.shape[-1]), scores


def page_extremes(keys: torch.Tensor, bias: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Element-wise minima and maxima of each page's resident keys, `[B, H, P, Dk]`; infinite where a page has none."""
    pages = keys.unflatten(2, (-1, page_size))
    empty = bias.unflatten(2, (-1, page_size))[..., None] < 0
    return pages.masked_fill(empty, float("inf")).amin(3), pages.masked_fill(empty, float("-inf")).amax(3)


def page_bounds(
    query: torch.Tensor,
    minima: torch.Tensor,
    maxima: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    page_size: int,
    softcap: float | None = None,
) -> torch.Tensor:
    """Upper bound of every page's logits from its min/max representative (Quest, section 3.3; RaaS, section 3).

    `bound[page] = max over the query group, sum over d, max(q_d * min_d, q_d * max_d) * scale`.

    Args:
        query: `[B, H * G, 1, Dk]`.
        minima, maxima: `[B, H, P, Dk]`.
        bias: `[B, H, N]`; a page without a resident token gets -inf.
        softcap: as in `attend`; tanh is monotone, so a capped bound still bounds the capped logits.

    Returns:
        `[B, H, P]` float32 (float64 for float64 inputs).
    """
    batch, heads, pages, _ = minima.shape
    accumulate = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(batch, heads, -1, query.shape[-1]).to(accumulate)
    resident = bias.view(batch, heads, pages, page_size).amax(-1) == 0
    # max(q * min, q * max) picks max where q > 0 and min where q < 0: two matrix products instead of a 5-d tensor.
    low = minima.to(accumulate).masked_fill(~resident[..., None], 0)
    high = maxima.to(accumulate).masked_fill(~resident[..., None], 0)
    bounds = grouped.clamp(min=0) @ high.mT + grouped.clamp(max=0) @ low.mT
    return _capped(bounds.amax(2) * scale, softcap).masked_fill_(~resident, float("-inf"))


def stamp(
    priority: torch.Tensor,
    scores: torch.Tensor,
    first: torch.Tensor,
    clock: torch.Tensor,
    alpha: float | None,
    top_ratio: float | None,
) -> None:
    """Set the timestamp of every milestone page to the present token's sequence index (RaaS, section 3).

    Args:
        priority: `[B, H, E]`, updated in place.
        scores: `[B, H, E]`, any float dtype; 0 for empty pages.
        first: `[B, H, E]` int32, sequence index of each page's first token.
        alpha: stamp the pages with `score >= alpha`; None for `top_ratio`.
        top_ratio: stamp the `ceil(top_ratio * held)` highest scores, ties to the older page; None for `alpha`.
    """
    if alpha is not None:
        milestone = scores >= alpha
    else:
        held = priority > float("-inf")
        by_age = first.argsort(-1)
        aged_scores = scores.masked_fill(~held, -1.0).gather(-1, by_age)
        ranked = by_age.gather(-1, aged_scores.argsort(dim=-1, descending=True, stable=True))
        wanted = (held.sum(-1, keepdim=True).double() * top_ratio).ceil()
        in_top = torch.arange(scores.shape[-1], device=scores.device) < wanted
        milestone = torch.zeros_like(held).scatter_(-1, ranked, in_top)
    priority.masked_fill_(milestone, clock.tolist()[0])
