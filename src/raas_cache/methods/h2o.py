"""H2O: Heavy-Hitter Oracle for Efficient Generative Inference (Zhang et al., NeurIPS 2023, arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cache.paged_cache import PagedCache
from ..engine.policy import Pages, Policy, check_number
from .registry import register_cache, register_policy


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..cache.settings import Budget, CacheOptions


@register_policy("h2o")
@dataclass(frozen=True)
class H2OPolicy(Policy):
    """Keep the pages with the largest sum of attention so far, and the newest pages (algorithm 1).

    Args:
        recent_ratio: share of the pages that are kept because they are the newest. In [0, 1]; the paper uses 0.5.

    Raises:
        TypeError, ValueError: `recent_ratio` is not a number or out of range.
    """

    recent_ratio: float = 0.5

    prompt = "evict"
    page_score = "sum"
    group_score = "mean"
    prompt_window = None
    state = ("attention",)

    def __post_init__(self) -> None:
        check_number("recent_ratio", self.recent_ratio, lambda share: 0 <= share <= 1, "lie in [0, 1]: try 0.5")

    def on_scores(self, pages: Pages) -> None:
        attention = pages.state["attention"].add_(pages.scores)
        recent = (self.recent_ratio * pages.limit.double()).long()
        ranked = attention.masked_fill(pages.newest(recent), float("inf"))
        pages.priority.copy_(ranked.masked_fill(~pages.held, float("-inf")))


@register_cache("h2o")
class H2OCache(PagedCache):
    """H2O: keep the pages with the largest sum of attention so far, and the newest pages; see `H2OPolicy`.

    Args:
        budget (`int`): number of tokens to hold for each row, layer and KV head.
        recent_ratio (`float`): share of the pages that are kept because they are the newest.
        options: as `PagedCache`.
    """

    def __init__(self, budget: Budget, *, recent_ratio: float = 0.5, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=H2OPolicy(recent_ratio), **options)
