"""G-KV: Decoding-Time KV Cache Eviction with Global Attention (Liao et al., 2025, arXiv 2512.00504).

Rule: global importance is the largest attention to a page so far, where older attention decays.
If a page is needed, the page with the smallest 0.5 * importance - 0.5 * redundancy is evicted. The newest tokens stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..cache.paged_cache import PagedCache
from ..engine.policy import Pages, Policy, check_number
from .registry import register_cache, register_policy
from .rkv import redundancy


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..cache.settings import Budget, CacheOptions


OBSERVED = 16  # number of newest queries that decide local importance, and number of newest tokens that are always kept
ROUND = 128  # number of tokens between two evictions in the paper


@register_policy("gkv")
@dataclass(frozen=True)
class GKVPolicy(Policy):
    """Evict pages that had little attention at any time and are redundant. Redundancy is as in `RKVPolicy`.

    Local importance is a running mean of a page's attention over about the last 16 queries (the paper: exactly 16),
    divided by the largest one of the row. Global importance is the maximum of the local importance and the earlier
    global importance, which decays. Redundancy is divided by the largest one, too. The paper updates all of this every
    128 tokens; here it is updated at every step, with a decay of `decay ** (1 / 128)`.

    Args:
        decay: factor on the global importance in 128 tokens. In [0, 1]; the authors use 0.8.
        importance_weight: weight of importance in the priority; redundancy has the rest. In [0, 1]; the
            scripts of the authors use 0.5.

    Raises:
        TypeError, ValueError: an argument is not a number or out of range.
    """

    decay: float = 0.8
    importance_weight: float = 0.5

    prompt = "evict"
    page_score = "sum"
    prompt_window = OBSERVED
    state = ("local", "importance")

    def __post_init__(self) -> None:
        check_number("decay", self.decay, lambda factor: 0 <= factor <= 1, "lie in [0, 1]: try 0.8")
        check_number("importance_weight", self.importance_weight, lambda w: 0 <= w <= 1, "lie in [0, 1]: try 0.1")

    def on_scores(self, pages: Pages) -> None:
        share = min(pages.queries / OBSERVED, 1.0)
        local = pages.state["local"].lerp_(pages.scores.double() / pages.queries, share)
        importance = pages.state["importance"].mul_(self.decay ** (pages.queries / ROUND))
        importance.copy_(torch.maximum(importance, _share_of_largest(local, pages.held)))
        redundant = _share_of_largest(redundancy(pages), pages.held)
        ranked = self.importance_weight * importance - (1 - self.importance_weight) * redundant
        ranked = ranked.masked_fill(pages.newest(math.ceil(OBSERVED / pages.page_size)), float("inf"))
        pages.priority.copy_(ranked.masked_fill(~pages.held, float("-inf")))


def _share_of_largest(values: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Values `[batch, kv_heads, pages]` divided by the largest value of a held page."""
    return values / values.masked_fill(~held, 0).amax(-1, keepdim=True).clamp(min=1e-30)


@register_cache("gkv")
class GKVCache(PagedCache):
    """G-KV: evict pages that had little attention at any time and are redundant; see `GKVPolicy`.

    Args:
        budget (`int`): number of tokens that each row, layer and KV head holds.
        decay (`float`): factor on the global importance in 128 tokens.
        importance_weight (`float`): weight of importance; redundancy has the rest.
        options: as in `PagedCache`.
    """

    def __init__(
        self, budget: Budget, *, decay: float = 0.8, importance_weight: float = 0.5, **options: Unpack[CacheOptions]
    ):
        super().__init__(budget, policy=GKVPolicy(decay, importance_weight), **options)
