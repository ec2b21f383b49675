"""Budgets of the layers, learnt from a calibration text: layers that look back far get what others can spare."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from ..cache.paged_layer import PagedLayer
from ..common.upstream import CACHE_ARGUMENT
from ..methods.raas import RaaSCache
from .read_text import read


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..methods.raas import RaaSOptions


@torch.no_grad()
def learn_budgets(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    budget: int,
    max_new_tokens: int,
    *,
    levels: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
    **options: Unpack[RaaSOptions],
) -> list[int]:
    """A budget for each layer, `budget` on average, for `RaaSCache` with a pinned prompt.

    The model generates from `inputs` with everything kept. Then each layer in turn gets the decode pages that `budget`
    leaves times each of the `levels`, all others keep everything, and the log-likelihood that this costs the text is
    noted. Pages are dealt out where they save most, as if costs of layers added up.

    It takes `1 + layers * len(levels)` times as long as to generate the calibration text.

    Args:
        model: the model that the budgets are for.
        inputs: a calibration prompt or a batch of them, as for `generate`, like what the model will be used for.
        budget: tokens to hold on average over the layers, the prompt counted in.
        max_new_tokens: tokens to generate for each; far more than the budget leaves, for something must be lost.
        levels: shares of the decode pages to try a layer at, ascending.
        options: `page_size`, `alpha` and the like of the `RaaSCache` that will use the budgets.

    Raises:
        ValueError: the budget leaves no page beside the calibration prompt, or no layer loses anything.

    Example:

    ```python
    >>> budgets = learn_budgets(model, tokenizer(example, return_tensors="pt"), budget=1024, max_new_tokens=8000)
    >>> cache = RaaSCache(budgets, min_decode_pages=1)  # a layer may have learnt to do with less than the usual floor
    >>> out = model.generate(**inputs, past_key_values=cache)
    ```
    """
    options = {"page_size": 16, **options, "min_decode_pages": 1, "config": model.config}
    page_size, length = options["page_size"], inputs["input_ids"].shape[1]
    prompt_pages, text_pages = math.ceil(length / page_size), math.ceil((length + max_new_tokens) / page_size) + 1
    pages_each = budget // page_size - prompt_pages
    if pages_each < 1:
        raise ValueError(f"budget={budget} leaves no page of {page_size} tokens beside a prompt of {length} tokens.")
    everything = RaaSCache(text_pages * page_size, **options)
    greedy = {CACHE_ARGUMENT: everything, "max_new_tokens": max_new_tokens, "do_sample": False}
    text: torch.Tensor = model.generate(**inputs, **greedy)  # type: ignore[operator]
    layers = [index for index, layer in enumerate(everything.layers) if isinstance(layer, PagedLayer)]

    def loss(pages: Mapping[int, int]) -> float:
        of_layers = [pages.get(index, text_pages) + prompt_pages for index in range(len(everything.layers))]
        return _loss(model, inputs, text, RaaSCache([count * page_size for count in of_layers], **options))

    at_best, most = loss({}), text_pages - prompt_pages
    tried = [min(max(1, round(level * pages_each)), most) for level in levels]
    lost = {index: [max(0.0, loss({index: pages}) - at_best) for pages in tried] for index in layers}
    if not any(map(any, lost.values())):
        raise ValueError(f"budget={budget} costs nothing over max_new_tokens={max_new_tokens}: generate more.")
    dealt = _deal_out({index: _interpolated(tried, curve, most) for index, curve in lost.items()}, pages_each)
    return [(prompt_pages + dealt.get(index, pages_each)) * page_size for index in range(len(everything.layers))]


def _loss(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], text: torch.Tensor, cache: RaaSCache) -> float:
    """Negative log-likelihood of the generated part of `text` `[batch, tokens]`, decoded with `cache`."""
    length = inputs["input_ids"].shape[1]
    losses = read(model, text, length, cache, inputs.get("attention_mask"))
    padding = model.generation_config.pad_token_id  # what stands behind a text that ended early
    return losses[text[:, length:] != padding].sum().item() if padding is not None else losses.sum().item()


def _interpolated(pages: list[int], lost: list[float], most: int) -> list[float]:
    """What is lost with 0, 1, 2 ... `most` pages; with fewer than were tried as much as with the fewest tried."""
    points = [(0, lost[0]), *zip(pages, lost, strict=True), (most, 0.0)]
    curve = [lost[0]]
    for (left, before), (right, after) in itertools.pairwise(points):
        curve += [before + (after - before) * step / (right - left) for step in range(1, right - left + 1)]
    return curve


def _deal_out(lost: dict[int, list[float]], pages_each: int) -> dict[int, int]:
    """Pages for each layer, `pages_each` on average: where they save most. `lost[layer][n]` is lost with n pages."""
    pages = dict.fromkeys(lost, max(1, pages_each // 4))  # what calibration has not seen may come
    left = pages_each * len(lost) - sum(pages.values())
    while left:
        # Saved for each page by going from `held` to `more`: a curve may be flat for a page and then fall.
        rates = [
            ((curve[held] - curve[more]) / (more - held), index, more - held)
            for index, curve in lost.items()
            for held in [pages[index]]
            for more in range(held + 1, min(held + left, len(curve) - 1) + 1)
        ]
        rate, index, more = max(rates, default=(0.0, 0, 0))
        if rate <= 0:  # nothing to save any more: share what is left
            for rank, index in enumerate(pages):
                pages[index] += left // len(pages) + (rank < left % len(pages))
            break
        pages[index] += more
        left -= more
    return pages
