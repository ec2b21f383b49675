"""R-KV: Redundancy-aware KV Cache Compression for Reasoning Models (Cai et al., NeurIPS 2025, arXiv 2505.24133).

Rule: importance is the recent attention to a page, and redundancy its similarity to the keys of other pages.
If a page is needed, the page with the smallest 0.1 * importance - 0.9 * redundancy is evicted. The newest tokens stay.
"""

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


OBSERVED = 8  # number of newest queries that decide importance, and number of newest tokens that are always kept
SIMILAR = 0.5  # cosine from which two keys count as similar


def redundancy(pages: Pages) -> torch.Tensor:
    """How similar each page is to the other pages, `[batch, kv_heads, pages]` float64; the sum over the pages is 1.

    The mean cosine between the mean key of a page and the mean keys of the other pages, followed by a softmax over the
    pages. The similarity to the newest similar page is not counted for that page.
    """
    held, keys = pages.held, normalize(pages.mean_keys().double(), dim=-1, eps=1e-8)
    # Compare only held pages, and no page with itself.  [batch, kv_heads, pages, pages]
    pairs = held[..., None] & held[..., None, :] & ~torch.eye(held.shape[-1], dtype=torch.bool, device=held.device)
    similarity = (keys @ keys.mT).masked_fill(~pairs, 0.0)
    newest = pages.first[..., None, :].masked_fill(similarity <= SIMILAR, -1).argmax(-1, keepdim=True)
    spared = torch.where(similarity.gather(-1, newest) > SIMILAR, 0.0, similarity.gather(-1, newest))
    similarity.scatter_(-1, newest, spared)
    mean = similarity.sum(-2) / held.sum(-1, keepdim=True).clamp(min=1)
    return mean.masked_fill(~held, float("-inf")).softmax(-1).nan_to_num(0.0)


@register_policy("rkv")
@dataclass(frozen=True)
class RKVPolicy(Policy):
    """Evict pages that are unimportant and redundant: SnapKV's importance minus similarity of keys (section 3).

    Importance is a running mean of a page's attention over about the last 8 queries (the paper: the mean of exactly 8
    queries). Redundancy is the mean cosine between a page's mean key and the mean keys of the other pages, followed by
    a softmax over the pages. The similarity to the newest similar page is not counted for that page. The paper evicts
    128 tokens at a time; here one page is evicted whenever a page is needed. Pages replace the paper's pooling over
    neighbouring tokens.

    Args:
        importance_weight: weight of importance in the priority; redundancy has the rest. In [0, 1]; the paper uses 0.1.

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
        ranked = self.importance_weight * importance - (1 - self.importance_weight) * redundancy(pages)
        ranked = ranked.masked_fill(pages.newest(math.ceil(OBSERVED / pages.page_size)), float("inf"))
        pages.priority.copy_(ranked.masked_fill(~pages.held, float("-inf")))


@register_cache("rkv")
class RKVCache(PagedCache):
    """R-KV: evict pages that are unimportant and redundant; see `RKVPolicy`.

    Args:
        budget (`int`): number of tokens that each row, layer and KV head holds.
        importance_weight (`float`): weight of importance; redundancy has the rest.
        options: as in `PagedCache`.
    """

    def __init__(self, budget: Budget, *, importance_weight: float = 0.1, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=RKVPolicy(importance_weight), **options)
