"""Learn a budget for each layer from a calibration text. Layers that attend far back get a larger budget."""

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
    """Learn a budget for each layer, with `budget` as their mean, for a `RaaSCache` with a pinned prompt.

    The model first generates from `inputs` with everything kept. Then the budget of one layer at a time is varied,
    while all other layers keep everything. Each of the `levels` is tried: it is a factor on the decode pages that
    `budget` gives. The function measures how much log-likelihood the text loses. It then gives each page to the layer
    that gains most from it, and assumes that the losses of the layers add up.

    This takes `1 + layers * len(levels)` times as long as generating the calibration text.

    Args:
        model: the model that will use the budgets.
        inputs: a calibration prompt or a batch of prompts, as for `generate`. It should be typical for the task.
        budget: mean number of tokens that a layer holds, including the prompt.
        max_new_tokens: tokens to generate per prompt. Use far more than the budget holds, so that pages are evicted.
        levels: factors on the decode pages of a layer to try, in ascending order.
        options: `page_size`, `alpha` and other options of the `RaaSCache` that will use the budgets.

    Returns:
        One budget per layer of the cache.

    Raises:
        ValueError: the budget leaves no page beside the calibration prompt, or no layer loses anything.

    Example:

    ```python
    >>> budgets = learn_budgets(model, tokenizer(example, return_tensors="pt"), budget=1024, max_new_tokens=8000)
    >>> cache = RaaSCache(budgets, min_decode_pages=1)  # a layer may have got fewer pages than the default
    >>> out = model.generate(**inputs, past_key_values=cache)
    ```
    """
    options = {"page_size": 16, **options, "min_decode_pages": 1, "config": model.config}
    page_size, length = options["page_size"], inputs["input_ids"].shape[1]
    prompt_pages, text_pages = math.ceil(length / page_size), math.ceil((length + max_new_tokens) / page_size) + 1
    pages_each = budget // page_size - prompt_pages
    if pages_each < 1:
        raise ValueError(
            f"budget={budget} leaves no page of {page_size} tokens beside a prompt of {length} tokens: raise it."
        )
    everything = RaaSCache(text_pages * page_size, **options)
    greedy = {CACHE_ARGUMENT: everything, "max_new_tokens": max_new_tokens, "do_sample": False}
    text: torch.Tensor = model.generate(**inputs, **greedy)  # type: ignore[operator]
    layers = [index for index, layer in enumerate(everything.layers) if isinstance(layer, PagedLayer)]

    def loss(pages: Mapping[int, int]) -> float:
        counts = [pages.get(index, text_pages) + prompt_pages for index in range(len(everything.layers))]
        return _loss(model, inputs, text, RaaSCache([count * page_size for count in counts], **options))

    at_best, most = loss({}), text_pages - prompt_pages
    tried = [min(max(1, round(level * pages_each)), most) for level in levels]
    lost = {index: [max(0.0, loss({index: pages}) - at_best) for pages in tried] for index in layers}
    if not any(map(any, lost.values())):
        raise ValueError(f"budget={budget} loses nothing over max_new_tokens={max_new_tokens}: raise max_new_tokens.")
    dealt = _deal_out({index: _interpolated(tried, curve, most) for index, curve in lost.items()}, pages_each)
    return [(prompt_pages + dealt.get(index, pages_each)) * page_size for index in range(len(everything.layers))]


def _loss(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], text: torch.Tensor, cache: RaaSCache) -> float:
    """Negative log-likelihood of the generated part of `text` `[batch, tokens]`, decoded with `cache`."""
    length = inputs["input_ids"].shape[1]
    losses = read(model, text, length, cache, inputs.get("attention_mask"))
    padding = model.generation_config.pad_token_id  # follows a text that ended early
    return losses[text[:, length:] != padding].sum().item() if padding is not None else losses.sum().item()


def _interpolated(pages: list[int], lost: list[float], most: int) -> list[float]:
    """Loss with 0, 1, 2 ... `most` pages. Below the smallest number tried, the loss is that of the smallest number."""
    points = [(0, lost[0]), *zip(pages, lost, strict=True), (most, 0.0)]
    curve = [lost[0]]
    for (left, before), (right, after) in itertools.pairwise(points):
        curve += [before + (after - before) * step / (right - left) for step in range(1, right - left + 1)]
    return curve


def _deal_out(lost: dict[int, list[float]], pages_each: int) -> dict[int, int]:
    """Distribute pages to the layers that gain most, `pages_each` on average. `lost[layer][n]`: loss with n pages."""
    pages = dict.fromkeys(lost, max(1, pages_each // 4))  # a minimum for every layer, because other texts differ
    left = pages_each * len(lost) - sum(pages.values())
    while left:
        # Gain per page from `held` to `more` pages. Look more than one page ahead: a curve may be flat and then fall.
        rates = [
            ((curve[held] - curve[more]) / (more - held), index, more - held)
            for index, curve in lost.items()
            for held in [pages[index]]
            for more in range(held + 1, min(held + left, len(curve) - 1) + 1)
        ]
        rate, index, more = max(rates, default=(0.0, 0, 0))
        if rate <= 0:  # no layer gains any more: distribute the remaining pages equally
            for rank, index in enumerate(pages):
                pages[index] += left // len(pages) + (rank < left % len(pages))
            break
        pages[index] += more
        left -= more
    return pages
