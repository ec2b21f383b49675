"""Dense: every page is kept and read, on the same store as every other method."""

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
    """Evict nothing: O(N) time and memory, the accuracy that all other methods are measured against.

    Nothing depends on the scores, so they are the page's share of the attention, for those who record it.
    """

    prompts = ("pin",)
    page_score = "sum"
    group_score = "mean"
    evicts = False

    def on_scores(self, pages: Pages) -> None:
        pass


@register_cache("dense")
class DenseCache(PagedCache):
    """Keep and read everything, on the store of the other methods; see `DensePolicy`. `budget` bounds nothing here."""

    def __init__(self, budget: Budget, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=DensePolicy(), **options)
