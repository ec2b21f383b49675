"""VaSE: Value-Aware Stochastic KV Cache Eviction for Reasoning Models (Chang et al., 2026, arXiv 2606.03928).

Rule: pages with a large value range and the newest tokens are kept.
If a page is needed, a draw decides which other page is evicted; a page with more attention stays with more probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING

from ..cache.paged_cache import PagedCache
from ..engine.draw import layer_seed
from ..engine.policy import Pages, Policy, check_number
from .registry import register_cache, register_policy


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..cache.settings import Budget, CacheOptions


OBSERVED = 8  # number of newest queries that decide the attention, and number of newest tokens that are always kept


@register_policy("vase")
@dataclass(frozen=True)
class VaSEPolicy(Policy):
    """Protect the pages with the largest value ranges, and draw the page to evict from the other pages.

    The value range of a page is the largest range of its tokens: the largest minus the smallest component of a value.
    The draw gives each page the number `attention / e`, where `e` is drawn from an exponential distribution, and evicts
    the page with the smallest number. To keep n pages in this way is to sample n pages without replacement, with
    probabilities in proportion to their attention. The attention is a running mean over about the last 8 queries.
    We know the paper from its abstract and summaries: the window, the share and this form of the draw are ours.

    Args:
        protected_ratio: share of the pages that are kept because of their value range. In [0, 1].
        seed: another seed gives other draws. In [0, 2**32).

    Raises:
        TypeError, ValueError: an argument is not a number or out of range.
    """

    protected_ratio: float = 0.1
    seed: int = 0

    prompt = "evict"
    page_score = "sum"
    group_score = "mean"
    prompt_window = OBSERVED
    state = ("attention",)

    def __post_init__(self) -> None:
        check_number("protected_ratio", self.protected_ratio, lambda share: 0 <= share <= 1, "lie in [0, 1]: try 0.1")
        check_number("seed", self.seed, lambda seed: 0 <= seed < 1 << 32, "lie in [0, 2**32): try 0", Integral)

    def for_layer(self, layer_idx: int) -> Policy:
        return replace(self, seed=layer_seed(self.seed, layer_idx))

    def on_scores(self, pages: Pages) -> None:
        share = min(pages.queries / OBSERVED, 1.0)
        attention = pages.state["attention"].lerp_(pages.scores.double() / pages.queries, share)
        drawn = attention / -pages.uniform(self.seed).log()  # [batch, kv_heads, pages]
        # In bfloat16, the same token at two places has the same value range, also if rounding differs there.
        ranges = pages.value_range().bfloat16()
        protected = pages.largest(ranges, (self.protected_ratio * pages.limit.double()).long())
        kept = protected | pages.newest(math.ceil(OBSERVED / pages.page_size))
        pages.priority.copy_(drawn.masked_fill(kept, float("inf")).masked_fill(~pages.held, float("-inf")))


@register_cache("vase")
class VaSECache(PagedCache):
    """VaSE: protect pages with a large value range, and draw the page to evict; see `VaSEPolicy`.

    Args:
        budget (`int`): number of tokens that each row, layer and KV head holds.
        protected_ratio (`float`): share of the pages that are kept because of their value range.
        seed (`int`): another seed gives other draws.
        options: as in `PagedCache`.
    """

    def __init__(self, budget: Budget, *, protected_ratio: float = 0.1, seed: int = 0, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=VaSEPolicy(protected_ratio, seed), **options)
