"""Random: a draw decides which page is evicted. The null method (Random Attention, arXiv 2609.03430).

Rule: the prompt and the newest 64 tokens are kept.
If a page is needed, one of the other pages is evicted, each with the same probability.
"""

from __future__ import annotations

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


@register_policy("random")
@dataclass(frozen=True)
class RandomPolicy(Policy):
    """Keep the newest pages, and evict one of the other pages at random.

    Each eviction is a new draw over the pages that are held. Layers, KV heads and steps draw independently. A draw is a
    function of `seed` and of the tokens that the row has seen, so the same input gives the same output, and a row in a
    batch gives the output that it gives alone. The attention scores have no effect.

    Args:
        recent_tokens: number of newest tokens that are kept, rounded up to whole pages. If a row has no room for more
            tokens than these, the oldest page is evicted.
        seed: another seed gives other draws. In [0, 2**32).

    Raises:
        TypeError, ValueError: an argument is not an int or out of range.
    """

    recent_tokens: int = 64
    seed: int = 0

    prompt_window = 1

    def __post_init__(self) -> None:
        check_number("recent_tokens", self.recent_tokens, lambda count: count >= 0, "be 0 or more: try 64", Integral)
        check_number("seed", self.seed, lambda seed: 0 <= seed < 1 << 32, "lie in [0, 2**32): try 0", Integral)

    def for_layer(self, layer_idx: int) -> Policy:
        return replace(self, seed=layer_seed(self.seed, layer_idx))

    def on_scores(self, pages: Pages) -> None:
        recent = pages.newest(-(-self.recent_tokens // pages.page_size))
        ranked = pages.uniform(self.seed).masked_fill(recent, float("inf"))
        pages.priority.copy_(ranked.masked_fill(~pages.held, float("-inf")))


@register_cache("random")
class RandomCache(PagedCache):
    """Keep the prompt and the newest tokens, and evict other pages at random; see `RandomPolicy`.

    Args:
        budget (`int`): number of tokens that each row, layer and KV head holds.
        recent_tokens (`int`): number of newest tokens that are kept.
        seed (`int`): another seed gives other draws.
        options: as in `PagedCache`.
    """

    def __init__(self, budget: Budget, *, recent_tokens: int = 64, seed: int = 0, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=RandomPolicy(recent_tokens, seed), **options)
