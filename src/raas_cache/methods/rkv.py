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


OBSERVED = 8  # newest queries that say what is important; the newest tokens, as many, are always kept
SIMILAR = 0.5  # cosine from which two keys say the same


@register_policy("rkv")
@dataclass(frozen=True)
class RKVPolicy(Policy):
    """Evict what is unimportant and redundant: SnapKV's importance, weighed against similarity of keys (section 3).

    Importance is a running mean of a page's attention over about the last 8 queries (the paper: the mean of just
    these). Redundancy is the mean cosine between a page's mean key and the others', softmax over pages, except that the
    newest of the pages that resemble a page is not blamed for it. The paper evicts 128 tokens at a time, here a page
    goes whenever one is needed, and a page takes the part of the paper's pooling over neighbours.

    Args:
        importance_weight: share of importance in the priority, the rest is for redundancy. In [0, 1]; the paper's 0.1.

    Raises:
        TypeError, ValueError: `importance_weight` is no number or out of range.
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
        # Only held pages resemble each other, and no page itself.
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
    """R-KV: evict what is unimportant and redundant; see `RKVPolicy`.

    Args:
        budget (`int`): tokens to hold for each row, layer and KV head.
        importance_weight (`float`): share of importance in what decides, the rest is for redundancy.
        options: as `PagedCache`.
    """

    def __init__(self, budget: Budget, *, importance_weight: float = 0.1, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=RKVPolicy(importance_weight), **options)
