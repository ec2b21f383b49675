"""TOVA: Transformers are Multi-State RNNs (Oren et al., EMNLP 2024, arXiv 2401.06104)."""

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
    """Evict the page with the least attention of the newest query, as the mean over all heads of the layer (section 4).

    The score of a page is the score of its highest token. With `page_size=1` this is the method of the paper.
    """

    prompt = "evict"
    granularity = "layer"
    group_score = "mean"
    prompt_window = 1

    def on_scores(self, pages: Pages) -> None:
        pages.priority.copy_(pages.scores.double().masked_fill(~pages.held, float("-inf")))


@register_cache("tova")
class TOVACache(PagedCache):
    """TOVA: evict the page with the least attention of the newest query; see `TOVAPolicy`."""

    def __init__(self, budget: Budget, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=TOVAPolicy(), **options)
