"""Attend in plain torch: the engine of CPU tensors, and the standard of the Triton kernels."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ...contents import take_pages, unpack_keys, unpack_values
from ...paged_kv import PagedKV


Reduction = Literal["max", "sum", "mean"]


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
    """See `raas_kernels.attend`."""
    # 1. Read the buffers where they are, or gather the rows and the pages to read, and decode 4-bit codes.
    keys, values, bias, key_scales, value_scales = (
        (kv.keys, kv.values, kv.bias, kv.key_scales, kv.value_scales)
        if rows is None and selected is None and kv.blocks is None and not kv.is_packed
        else _gathered(kv, rows, selected)
    )
    batch, heads, slots = keys.shape[:3]
    grouped = query.reshape(batch * heads, -1, query.shape[-1])  # [R * H, G, Dk]
    keys, values = keys.flatten(0, 1).mT, values.flatten(0, 1)  # [R * H, Dk, N] and [R * H, N, Dv]
    bias = bias.reshape(-1, 1, slots)
    if not grouped.dtype == keys.dtype == values.dtype == bias.dtype:
        grouped, keys, values = (states.to(bias.dtype) for states in (grouped, keys, values))

    # 2. Logits [R * H, G, N]. On the CPU, `@` copies strided keys and values, at twice the time of the attention.
    if softcap is None and key_scales is None:
        logits = torch.baddbmm(bias, grouped, keys, alpha=scale)
    else:
        factor = scale if key_scales is None else key_scales.reshape(-1, 1, slots) * scale
        logits = cap(torch.bmm(grouped, keys) * factor, softcap) + bias

    # 3. Weights, output and scores.
    if sinks is not None:
        sinks = sinks.view(1, heads, -1, 1).expand(batch, -1, -1, -1).reshape(batch * heads, -1, 1)
    weights = softmax(logits, sinks)
    scaled = weights if value_scales is None else weights * value_scales.reshape(-1, 1, slots)
    output = torch.bmm(scaled, values)
    if output.dtype != query.dtype:
        output = output.to(query.dtype)
    scores = score_pages(weights, kv.page_size, page_score, group_score)
    return output.view(batch, -1, 1, values.shape[-1]), scores.view(batch, heads, -1)


def _gathered(
    kv: PagedKV, rows: Tensor | None, selected: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys, values, bias and scales of `rows` `[R]`, all their slots or the pages `selected` `[R, H, K]`.

    4-bit codes are decoded, 8-bit codes are not.
    """
    take = partial(take_pages, rows=rows, selected=selected, entries=kv.page_size)
    take_contents = partial(take, blocks=kv.blocks)
    bias = take(kv.bias)
    if selected is not None:
        bias = bias.masked_fill((selected < 0).repeat_interleave(kv.page_size, -1), float("-inf"))
    if kv.is_packed:
        keys, values = (unpack_any(kv, bias.dtype, rows, selected) for unpack_any in (unpack_keys, unpack_values))
        return keys, values, bias, None, None
    scales = (None if tensor is None else take_contents(tensor) for tensor in (kv.key_scales, kv.value_scales))
    return take_contents(kv.keys), take_contents(kv.values), bias, *scales  # type: ignore[return-value]  # two scales


def score_pages(weights: Tensor, page_size: int, page_score: Reduction, group_score: Reduction) -> Tensor:
    """Scores `[R * H, P]` from weights `[R * H, G, N]`."""
    if page_score == group_score == "max":
        return weights.amax(1).view(weights.shape[0], -1, page_size).amax(-1)
    pages: Tensor = weights.unflatten(-1, (-1, page_size))  # [R * H, G, P, S]
    pages = pages.amax(-1) if page_score == "max" else pages.sum(-1)
    return pages.amax(1) if group_score == "max" else pages.mean(1)


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(logits / softcap)`, or the logits."""
    return logits if softcap is None else (logits / softcap).tanh_() * softcap


def softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension; `sinks` `[..., 1]` takes a part of the weight and is left out of the result."""
    if sinks is None:
        return logits.softmax(-1)
    return torch.cat([logits, sinks.to(logits.dtype).expand(*logits.shape[:-1], 1)], -1).softmax(-1)[..., :-1]
