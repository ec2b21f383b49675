"""The four paged operations in plain torch: the CPU engine, and what the Triton kernels are checked against.

A layer's store is a set of static buffers, written in place (shapes as in the package docstring):

    keys        [B, H, N, Dk]   one page = S consecutive slots; K has RoPE applied, so slots need no order
    values      [B, H, N, Dv]
    bias        [B, H, N]       float32 (float64 for float64 keys): 0 where a token is resident, -inf where none is, or
                                where the attention mask hides it
    positions   [B, H, N]       int32, sequence index of the token in a slot; -1, or past the clock, where none is
    priority    [B, H, E]       float64, page with the smallest value is evicted first; -inf = holds nothing
    open_slot   [B, H]          int64, first slot of the decode page that takes the next token
    clock       [B, H, 2]       int64, (sequence index, decode-token index) of the newest token; each (row, KV head) has
                                a clock of its own
    minima, maxima [B, H, P, Dk]  element-wise bounds of each page's keys (only to score by them or to select pages);
                              of an 8-bit store in float32
    scales      two [B, H, N]   float32, what a slot's key and value codes are multiplied by (only for 8-bit stores)

Keys and values of an 8-bit store are int8 or float8_e4m3fn codes, each token and head with a scale of its own.
"""

from collections.abc import Callable
from typing import Literal

import torch


CODE_RANGE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
Reduction = Literal["max", "sum", "mean"]
Scales = tuple[torch.Tensor, torch.Tensor]


def quantize(states: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit codes of `states` `[..., D]` in `dtype`, and the scales `[...]` float32 that give the states back."""
    largest = states.abs().amax(-1).float()
    scales = torch.where(largest == 0, 1.0, largest / CODE_RANGE[dtype])
    codes = (states.float() / scales[..., None]).clamp_(-CODE_RANGE[dtype], CODE_RANGE[dtype])
    # Half up, not half to even: the Triton kernels have only floor.
    return (codes.add_(0.5).floor_() if dtype == torch.int8 else codes).to(dtype), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The states `[..., D]` that `quantize` gave `codes` and `scales` for, but for rounding, in `dtype`."""
    accumulate = torch.promote_types(dtype, torch.float32)
    return (codes.to(accumulate) * scales[..., None]).to(dtype)


def victim(positions: torch.Tensor, priority: torch.Tensor, page_size: int) -> torch.Tensor:
    """The page that `append` recycles next: the smallest `(priority, first sequence index)`, so an empty page first.

    Returns:
        `[B, H]` int64, index among the E decode pages.
    """
    first = positions[..., positions.shape[-1] - priority.shape[-1] * page_size :: page_size]
    # An empty page has no first token; among equals the leftmost is taken, by argmin here and in Triton.
    oldest = priority == priority.amin(-1, keepdim=True)
    return first.masked_fill(~oldest, torch.iinfo(first.dtype).max).argmin(-1)


def finite(states: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """`states` with 0 for every NaN and infinity of a hidden token: its weight is 0, and 0 * NaN is NaN.

    Finite values stay, for a later attention mask may show the token.

    Args:
        hidden: bool, broadcasts against `states`.
    """
    return torch.where(hidden & ~states.isfinite(), 0, states)


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
    scales: Scales | None = None,
    visible: torch.Tensor | None = None,
    may_close: bool = False,
) -> None:
    """Advance the clock and write one decode token a row into the open page; when that is full, recycle the victim.

    "The open page's timestamp becomes t" at every token (RaaS, section 3). A page that stays open until it is full
    cannot be a victim before, so its priority is written only at its first and its last token. `may_close` writes it
    at every token, for stores in which input may close a page early.

    Args:
        key, value: `[B, H, 1, Dk]` and `[B, H, 1, Dv]`, dtype of `keys` / `values`, or what becomes 8-bit codes.
        page_size: S, tokens a page.
        minima, maxima: bounds to keep up to date, or None.
        scales: of an 8-bit store's keys and values; None for any other.
        visible: `[B]` bool, False where the attention mask hides the token; None if it hides no row's.
        may_close: whether a page may be closed before it is full.
    """
    clocks = clock.flatten(0, 1).tolist()  # quicker than to index first
    if clocks.count(clocks[0]) < len(clocks):  # rows that are not in step need what is computed row by row
        append_in_graph(
            keys, values, bias, positions, priority, open_slot, clock, key, value, page_size, minima, maxima, scales,
            visible, may_close,
        )  # fmt: skip
        return
    clock += 1
    now, decoded = (count + 1 for count in clocks[0])
    offset = decoded % page_size
    first_decode_slot = keys.shape[2] - priority.shape[-1] * page_size
    if offset == 0:
        torch.add(victim(positions, priority, page_size) * page_size, first_decode_slot, out=open_slot)
        lane = torch.arange(page_size, device=keys.device)
        page = open_slot[..., None] + lane
        bias.scatter_(2, page, float("-inf"))
        positions.scatter_(2, page, (now + lane).int().expand_as(page))
    slot = (open_slot + offset).unsqueeze(-1)
    hidden = None if visible is None or visible.all() else ~visible[:, None, None]
    if hidden is not None:
        key, value = (finite(new, hidden[..., None]) for new in (key, value))
    writes, key = _writes(keys, values, key, value, scales)
    for held, new in writes:
        held.scatter_(2, (slot if new.ndim == 3 else slot.unsqueeze(-1)).expand_as(new), new)
    if hidden is None:
        bias.scatter_(2, slot, 0)
    else:
        bias.scatter_(2, slot, torch.zeros_like(slot, dtype=bias.dtype).masked_fill_(hidden, float("-inf")))
    if may_close or offset in (0, page_size - 1):
        priority.scatter_(2, (open_slot[..., None] - first_decode_slot) // page_size, now)
    if minima is not None and maxima is not None:
        page = (open_slot // page_size)[..., None, None].expand_as(key)
        for bounds, fold, empty in ((minima, torch.minimum, float("inf")), (maxima, torch.maximum, float("-inf"))):
            seen = key if hidden is None else key.masked_fill(hidden[..., None], empty)
            bounds.scatter_(2, page, seen if offset == 0 else fold(bounds.gather(2, page), seen))


def _writes(
    keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: Scales | None
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """(Buffer, what is new in it) for one token, codes and scales if the store has 8 bits; and the key as held."""
    if scales is None:
        return [(keys, key), (values, value)], key
    (key_codes, key_scale), (value_codes, value_scale) = quantize(key, keys.dtype), quantize(value, values.dtype)
    held_key = dequantize(key_codes, key_scale, torch.promote_types(key.dtype, torch.float32))
    # Most of torch knows no float8: codes move as bytes.
    codes = [(held.view(torch.int8), new.view(torch.int8)) for held, new in ((keys, key_codes), (values, value_codes))]
    return [*codes, (scales[0], key_scale), (scales[1], value_scale)], held_key


def append_in_graph(
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
    scales: Scales | None = None,
    visible: torch.Tensor | None = None,
    may_close: bool = False,
) -> None:
    """`append` without a look at the clock: what is to be done is computed, for `torch.compile` to trace and fuse."""
    clock += 1
    now, offset = clock[..., 0], clock[..., 1] % page_size
    opening = offset == 0
    first_decode_slot = keys.shape[2] - priority.shape[-1] * page_size
    recycled = victim(positions, priority, page_size) * page_size + first_decode_slot
    open_slot.copy_(torch.where(opening, recycled, open_slot))
    lane = torch.arange(page_size, device=keys.device)
    rows = [torch.arange(size, device=keys.device) for size in keys.shape[:2]]
    row, head = rows[0][:, None], rows[1]
    page, slots = open_slot // page_size, open_slot[..., None] + lane
    shown = torch.ones_like(opening) if visible is None else visible[:, None].expand_as(opening)

    def put(held: torch.Tensor, index: torch.Tensor, new: torch.Tensor) -> None:
        spread = [at.view(*at.shape, *[1] * (index.ndim - 2)) for at in (row, head)]
        held.index_put_((*spread, index), new.to(held.dtype))  # unlike scatter_, inductor does this in place

    unwritten = torch.where(opening[..., None], float("-inf"), bias.gather(2, slots))
    visibly = torch.where(shown, 0.0, float("-inf"))
    put(bias, slots, torch.where(lane == offset[..., None], visibly[..., None], unwritten))
    put(positions, slots, torch.where(opening[..., None], now[..., None] + lane, positions.gather(2, slots)))
    evictable = page - first_decode_slot // page_size
    stamped = torch.ones_like(opening) if may_close else opening | (offset == page_size - 1)
    put(priority, evictable, torch.where(stamped, now.to(priority.dtype), priority[row, head, evictable]))

    slot = open_slot + offset
    key, value = (new[:, :, 0] if visible is None else finite(new[:, :, 0], ~shown[..., None]) for new in (key, value))
    writes, key = _writes(keys, values, key, value, scales)
    for held, new in writes:
        put(held, slot, new)
    if minima is not None and maxima is not None:
        for bounds, fold, empty in ((minima, torch.minimum, float("inf")), (maxima, torch.maximum, float("-inf"))):
            seen = torch.where(shown[..., None], key, empty)
            put(bounds, page, torch.where(opening[..., None], seen, fold(bounds[row, head, page], seen)))


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    page_size: int,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    scales: Scales | None = None,
    page_score: Reduction = "max",
    group_score: Reduction = "max",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one decode token a row over every resident token, and each page's score from the same softmax.

    With both reductions `"max"`: `score[page] = max over the query group, max over the page's tokens,
    softmax(q . k * scale)` (RaaS, section 3).

    Args:
        query: `[B, H * G, 1, Dk]`; the G query heads of a KV head are consecutive.
        scale: factor on `q . k`.
        page_size: S, tokens a page.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2), or None.
        sinks: `[H * G]`, one more logit in each query head's softmax, with nothing behind it (gpt-oss), or None.
        table: `[B, H, K]` int, the pages to read, no other is; None reads all.
        scales: of an 8-bit store's keys and values; None for any other.
        page_score: `"max"` or `"sum"` of a query head's weights on the page's tokens.
        group_score: `"max"` or `"mean"` over the query group.

    Returns:
        output `[B, H * G, 1, Dv]` in the query's dtype, scores `[B, H, P]` float32 (float64 for float64 inputs); with a
        table `[B, H, K]`, in its order.
    """
    if table is not None:
        pick = _picker(table, keys.shape[2] // page_size)
        keys, values, bias = (pick(states) for states in (keys, values, bias))
        scales = scales and (pick(scales[0]), pick(scales[1]))
    batch, heads, slots, _ = keys.shape
    grouped = query.reshape(batch * heads, -1, query.shape[-1])
    transposed, contents = keys.flatten(0, 1).mT, values.flatten(0, 1)
    accumulate = bias.dtype
    if not grouped.dtype == transposed.dtype == contents.dtype == accumulate:
        grouped, transposed, contents = (t.to(accumulate) for t in (grouped, transposed, contents))
    # baddbmm and bmm, not @: on the CPU matmul copies the strided K and V, at twice the time of the whole attention.
    if softcap is None and scales is None:
        logits = torch.baddbmm(bias.view(-1, 1, slots), grouped, transposed, alpha=scale)
    else:
        factor = scale if scales is None else scales[0].view(-1, 1, slots) * scale
        logits = _capped(torch.bmm(grouped, transposed) * factor, softcap) + bias.view(-1, 1, slots)
    if sinks is not None:
        sinks = sinks.view(1, heads, -1, 1).expand(batch, -1, -1, -1).reshape(batch * heads, -1, 1)
    weights = _softmax(logits, sinks)
    scaled = weights if scales is None else weights * scales[1].view(-1, 1, slots)
    output = torch.bmm(scaled, contents)
    if output.dtype != query.dtype:
        output = output.to(query.dtype)
    scores = _page_scores(weights, page_size, page_score, group_score)
    return output.view(batch, -1, 1, values.shape[-1]), scores.view(batch, heads, -1)


def _picker(table: torch.Tensor, pages: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that gathers the table's pages of a `[B, H, N, ...]` tensor: `[B, H, K * S, ...]`, contiguous."""
    batch, heads, _ = table.shape
    rows = torch.arange(batch * heads, device=table.device).view(batch, heads, 1)
    index = (rows * pages + table).flatten()

    def pick(states: torch.Tensor) -> torch.Tensor:
        # index_select knows no float8: codes move as bytes.
        movable = states.view(torch.int8) if states.element_size() == 1 else states
        picked = movable.reshape(batch * heads * pages, -1).index_select(0, index)
        return picked.view(batch, heads, -1, *states.shape[3:]).view(states.dtype)

    return pick


def _page_scores(weights: torch.Tensor, page_size: int, page_score: Reduction, group_score: Reduction) -> torch.Tensor:
    """Scores `[B * H, P]` from weights `[B * H, G, N]`."""
    if page_score == group_score == "max":
        return weights.amax(1).view(weights.shape[0], -1, page_size).amax(-1)
    pages: torch.Tensor = weights.unflatten(-1, (-1, page_size))
    pages = pages.amax(-1) if page_score == "max" else pages.sum(-1)
    return pages.amax(1) if group_score == "max" else pages.mean(1)


def _capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else (logits / softcap).tanh_() * softcap


def _softmax(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    if sinks is None:
        return logits.softmax(-1)
    return torch.cat([logits, sinks.to(logits.dtype).expand(*logits.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


def resident(positions: torch.Tensor, bias: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Whether each of `tokens` `[T]` (sequence indices) is resident, so no padding: `[B, H, T]` bool."""
    return ((positions[:, :, None] == tokens[:, None]) & (bias == 0)[:, :, None]).any(-1)


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
    page_score: Reduction = "max",
    group_score: Reduction = "max",
    observed: int | None = None,
    max_logits: int = 1 << 26,
    among: torch.Tensor | None = None,
    heads_share: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of T new tokens a row over the residents and, causally, over each other; scores as in `attend`.

    The new tokens are resident already: a query sees the slots whose position is not past its own, or of the new tokens
    those that `among` says. Rare (a new user turn, a prefill chunk), so torch serves every device, in blocks of queries
    that bound the logits in memory.

    Args:
        query: `[B, H * G, T, Dk]`.
        query_positions: `[T]` int, sequence index of each query.
        observed: how many of the last queries the scores come from; None for all. Padding gives none.
        max_logits: bound on the logits held at once, in elements.
        heads_share: reduce the scores of a query over all KV heads, by `group_score`, before those of several queries.
        among: `[B, T, new]` bool, which new tokens, T or more, each query sees; None for causal.

    Returns:
        output `[B, H * G, T, Dv]`, scores `[B, H, P]`, over the queries the max if `page_score` is, or the sum.
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
    first_observed = 0 if observed is None else length - observed
    for start in range(0, length, block):
        window = slice(start, min(start + block, length))
        logits = _capped(grouped[:, :, :, window].to(accumulate) * scale @ transposed, softcap)
        if among is None:
            allowed = positions[:, :, None] <= query_positions[window, None]
        else:
            place = (positions - query_positions[-1] - 1)[:, :, None] + among.shape[-1]
            # An empty slot may have any position.
            index = place.clamp(0, among.shape[-1] - 1).long().expand(-1, -1, window.stop - start, -1)
            allowed = (place < 0) | among[:, None, window].expand(-1, heads, -1, -1).gather(3, index)
        visible = (bias == 0)[:, :, None] & allowed
        # A padding query sees nothing: its row of the softmax is 0 / 0, and its output is never used.
        weights = _softmax(logits.masked_fill_(~visible[:, :, None], float("-inf")), sinks).nan_to_num_(0.0)
        output[:, :, :, window] = (weights @ contents).to(query.dtype)
        counted = slice(max(start, first_observed), window.stop)
        if counted.start < counted.stop:
            weights = weights[:, :, :, counted.start - start :]
            weights = weights * resident(positions, bias, query_positions[counted])[:, :, None, :, None]
            by_query = weights.permute(0, 1, 3, 2, 4).flatten(0, 2)
            by_query = _page_scores(by_query, page_size, page_score, group_score).unflatten(0, (batch, heads, -1))
            if heads_share:
                over_heads = torch.amax if group_score == "max" else torch.mean
                by_query = over_heads(by_query, 1, keepdim=True).expand_as(by_query)
            if page_score == "max":
                torch.maximum(scores, by_query.amax(2), out=scores)
            else:
                scores += by_query.sum(2)
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
        clock: `[B, H, 2]`, each (row, KV head)'s own.
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
        wanted = (held.sum(-1, keepdim=True).double() * top_ratio).ceil()  # type: ignore[operator]  # one is given
        in_top = torch.arange(scores.shape[-1], device=scores.device) < wanted
        milestone = torch.zeros_like(held).scatter_(-1, ranked, in_top)
    clocks = [] if torch.compiler.is_compiling() else clock[..., 0].flatten().tolist()
    if clocks and clocks.count(clocks[0]) == len(clocks):
        # A number costs the CPU engine three operators less than a tensor.
        priority.masked_fill_(milestone, clocks[0])
    else:
        priority.copy_(torch.where(milestone, clock[..., :1].to(priority.dtype), priority))
