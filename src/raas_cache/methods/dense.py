"""Dense: keep and read every page, in the same pages as all other methods."""

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
    """Evict nothing: O(N) time and memory for N tokens. All other methods are compared with its accuracy.

    Nothing depends on the scores. They are the share of the attention of each page, for recordings.
    """

    prompts = ("pin",)
    page_score = "sum"
    group_score = "mean"
    evicts = False

    def on_scores(self, pages: Pages) -> None:
        pass


@register_cache("dense")
class DenseCache(PagedCache):
    """Keep and read all pages; see `DensePolicy`. `budget` has no effect."""

    def __init__(self, budget: Budget, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=DensePolicy(), **options)
