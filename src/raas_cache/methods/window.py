"""Window: the prompt and the newest tokens. The baseline that every method with a pinned prompt must beat.

Rule: the prompt is never evicted.
If a page is needed, the oldest page of the chain is evicted.
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


@register_policy("window")
@dataclass(frozen=True)
class WindowPolicy(Policy):
    """Keep the prompt and the newest pages.

    The cache sets the priority of a page to the position of its newest token, so the oldest page is evicted. The
    attention scores have no effect. With `prompt="evict"`, this is StreamingLLM.
    """

    prompt_window = 0

    def on_scores(self, pages: Pages) -> None:
        pass


@register_cache("window")
class WindowCache(PagedCache):
    """Keep the prompt and the newest pages; see `WindowPolicy`. Arguments: as `PagedCache`."""

    def __init__(self, budget: Budget, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=WindowPolicy(), **options)
