"""TOVA: Transformers are Multi-State RNNs (Oren et al., EMNLP 2024, arXiv 2401.06104).

Rule: the newest query gives each page a score, the mean over the heads of the layer.
If a page is needed, the page with the smallest score is evicted.
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


@register_policy("tova")
@dataclass(frozen=True)
class TOVAPolicy(Policy):
    """Evict the page that the newest query attends to least, with the mean over the heads of the layer (section 4).

    A page has the score of its most attended token. With `page_size=1`, this is the paper's method.
    """

    prompt = "evict"
    granularity = "layer"
    group_score = "mean"
    prompt_window = 1

    def on_scores(self, pages: Pages) -> None:
        pages.priority.copy_(pages.scores.double().masked_fill(~pages.held, float("-inf")))


@register_cache("tova")
class TOVACache(PagedCache):
    """TOVA: evict the page that the newest query attends to least; see `TOVAPolicy`. Arguments as in `PagedCache`."""

    def __init__(self, budget: Budget, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=TOVAPolicy(), **options)
