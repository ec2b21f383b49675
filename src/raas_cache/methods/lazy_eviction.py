"""LazyEviction: Lagged KV Eviction for Efficient Long Reasoning (Zhang et al., 2025, arXiv 2506.15969).

Rule: a page has a timestamp, as in RaaS, and remembers the longest interval between two of its timestamps.
If a page is needed, the page is evicted whose time since its timestamp is the largest multiple of that interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

import torch

from ..cache.paged_cache import PagedCache
from ..engine.policy import Pages, Policy, check_number
from .registry import register_cache, register_policy


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..cache.settings import Budget, CacheOptions


@register_policy("lazy_eviction")
@dataclass(frozen=True)
class LazyEvictionPolicy(Policy):
    """Evict the page that is most overdue, measured by its longest recurrence interval. The newest tokens stay.

    The tokens of a page are timestamped together, and a page is also timestamped whenever it gets a token. The longest
    interval is taken over the life of the page: a page with attention at every step would otherwise have an interval of
    1. The paper evicts once per observation window; here one page is evicted whenever a page is needed, and
    the window is `recent_tokens`.

    Args:
        alpha: a page with a score of at least `alpha` gets a new timestamp. In (0, 1).
        recent_tokens: number of newest tokens that are kept, rounded up to whole pages.

    Raises:
        TypeError, ValueError: an argument is not a number or out of range.
    """

    alpha: float = 0.2
    recent_tokens: int = 64

    prompt = "evict"
    state = ("stamp", "interval")  # age of the page at its timestamp, and its longest interval, in tokens

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, lambda w: 0 < w < 1, "lie in (0, 1), as an attention weight: try 0.2")
        check_number("recent_tokens", self.recent_tokens, lambda count: count >= 0, "be 0 or more: try 64", Integral)

    def on_scores(self, pages: Pages) -> None:
        stamp, interval = pages.state["stamp"], pages.state["interval"]
        age = (pages.clock[..., :1] - pages.first).double()  # [batch, kv_heads, pages]
        stamped = (pages.scores >= self.alpha) | pages.holds_newest
        interval.copy_(torch.where(stamped, torch.maximum(interval, age - stamp), interval))
        stamp.copy_(torch.where(stamped, age, stamp))
        ranked = (stamp - age) / interval.clamp(min=1)  # 0 for a page with a new timestamp
        ranked = ranked.masked_fill(pages.newest(-(-self.recent_tokens // pages.page_size)), float("inf"))
        pages.priority.copy_(ranked.masked_fill(~pages.held, float("-inf")))


@register_cache("lazy_eviction")
class LazyEvictionCache(PagedCache):
    """LazyEviction: evict the page that is most overdue; see `LazyEvictionPolicy`.

    Args:
        budget (`int`): number of tokens that each row, layer and KV head holds.
        alpha (`float`): a page with a score of at least `alpha` gets a new timestamp.
        recent_tokens (`int`): number of newest tokens that are kept.
        options: as in `PagedCache`.
    """

    def __init__(self, budget: Budget, *, alpha: float = 0.2, recent_tokens: int = 64, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=LazyEvictionPolicy(alpha, recent_tokens), **options)
