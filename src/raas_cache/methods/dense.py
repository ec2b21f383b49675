"""Dense: all pages are kept and read, with the same pages and the same attention as every other method.

Rule: nothing is evicted. The cache grows with the sequence, and its output is the reference for all methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cache.paged_cache import PagedCache
from ..engine.policy import Pages, Policy
from .registry import register_cache, register_policy


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..cache.settings import Budget, CacheOptions


@register_policy("dense")
@dataclass(frozen=True)
class DensePolicy(Policy):
    """Evict nothing: O(N) time and memory.

    No decision depends on the scores. They are each page's share of the attention, for `raas_cache.record`.
    """

    prompts = ("pin",)
    page_score = "sum"
    group_score = "mean"
    evicts = False

    def on_scores(self, pages: Pages) -> None:
        pass


@register_cache("dense")
class DenseCache(PagedCache):
    """Keep and read everything, in pages; see `DensePolicy`. `budget` has no effect."""

    def __init__(self, budget: Budget, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=DensePolicy(), **options)
