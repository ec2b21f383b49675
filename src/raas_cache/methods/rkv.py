"""R-KV: Redundancy-aware KV Cache Compression for Reasoning Models (Cai et al., NeurIPS 2025, arXiv 2505.24133)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

from ..cache.paged_cache import PagedCache
from ..engine.policy import Pages, Policy, check_number
from .registry import register_cache, register_policy


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..cache.settings import Budget, CacheOptions


OBSERVED = 8  # number of newest queries that importance comes from; the pages of as many newest tokens are kept
SIMILAR = 0.5  # two pages are redundant if the cosine of their mean keys is larger


@register_policy("rkv")
@dataclass(frozen=True)
class RKVPolicy(Policy):
    """Evict pages that are unimportant and redundant: attention, weighed against similarity of keys (section 3).

    Importance is a running mean of the attention of a page over about the last 8 queries (in the paper, the exact mean
    of 8 queries). Redundancy is the mean cosine between the mean key of a page and the mean keys of all other pages,
    with a softmax over pages. Of several similar pages, the newest is not redundant: its similarity to the others does
    not count. The paper evicts 128 tokens at once; here, one page is evicted whenever a page is needed. Pages replace
    the paper's pooling over neighbouring tokens.

    Args:
        importance_weight: weight of importance in the priority; the rest is the weight of redundancy. In [0, 1]; the
            paper uses 0.1.

    Raises:
        TypeError, ValueError: `importance_weight` is not a number or out of range.
    """

    importance_weight: float = 0.1

    prompt = "evict"
    page_score = "sum"
    group_score = "mean"
    prompt_window = OBSERVED
    state = ("importance",)

    def __post_init__(self) -> None:
        check_number("importance_weight", self.importance_weight, lambda w: 0 <= w <= 1, "lie in [0, 1]: try 0.1")

    def on_scores(self, pages: Pages) -> None:
        share = min(pages.queries / OBSERVED, 1.0)
        importance = pages.state["importance"].lerp_(pages.scores.double() / pages.queries, share)
        held, keys = pages.held, normalize(pages.mean_keys().double(), dim=-1, eps=1e-8)
        # Compare evictable pages with each other, and no page with itself: [batch, kv_heads, pages, pages].
        pairs = held[..., None] & held[..., None, :] & ~torch.eye(held.shape[-1], dtype=torch.bool, device=held.device)
        similarity = (keys @ keys.mT).masked_fill(~pairs, 0.0)
        newest = pages.first[..., None, :].masked_fill(similarity <= SIMILAR, -1).argmax(-1, keepdim=True)
        spared = torch.where(similarity.gather(-1, newest) > SIMILAR, 0.0, similarity.gather(-1, newest))
        similarity.scatter_(-1, newest, spared)
        redundancy = similarity.sum(-2) / held.sum(-1, keepdim=True).clamp(min=1)
        redundancy = redundancy.masked_fill(~held, float("-inf")).softmax(-1).nan_to_num(0.0)
        ranked = self.importance_weight * importance - (1 - self.importance_weight) * redundancy
        ranked = ranked.masked_fill(pages.newest(math.ceil(OBSERVED / pages.page_size)), float("inf"))
        pages.priority.copy_(ranked.masked_fill(~held, float("-inf")))


@register_cache("rkv")
class RKVCache(PagedCache):
    """R-KV: evict pages that are unimportant and redundant; see `RKVPolicy`.

    Args:
        budget (`int`): number of tokens to hold for each row, layer and KV head.
        importance_weight (`float`): weight of importance in the priority; the rest is the weight of redundancy.
        options: as `PagedCache`.
    """

    def __init__(self, budget: Budget, *, importance_weight: float = 0.1, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=RKVPolicy(importance_weight), **options)
