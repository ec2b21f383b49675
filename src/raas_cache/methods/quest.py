"""Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (Tang et al., ICML 2024, arXiv 2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

from ..cache.paged_cache import PagedCache
from ..engine.policy import Pages, Policy, check_number
from .dense import DensePolicy
from .registry import register_cache, register_policy


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..cache.settings import Budget, CacheOptions


@register_policy("quest")
@dataclass(frozen=True)
class QuestPolicy(Policy):
    """Keep everything, read the pages with the highest min/max bound on their logits (section 3.3).

    The page with the newest token is always read. Forwards of several tokens read everything, as in the paper. The
    query heads of a KV head share a selection, by their largest bound.

    Args:
        dense_layers: layers at the bottom that read everything, as attention is less sparse there (section 3.4: 2).

    Raises:
        TypeError, ValueError: `dense_layers` is no number or negative.
    """

    dense_layers: int = 2

    prompt = "select"
    prompts = ("select", "pin")
    evicts = False
    reads = "top"

    def __post_init__(self) -> None:
        check_number(
            "dense_layers", self.dense_layers, lambda count: count >= 0, "be 0 or more layers: try 2", Integral
        )

    def for_layer(self, layer_idx: int) -> Policy:
        return DensePolicy() if layer_idx < self.dense_layers else self

    def on_scores(self, pages: Pages) -> None:
        pass


@register_cache("quest")
class QuestCache(PagedCache):
    """Quest: keep everything, read the `budget` tokens' worth of pages that matter most now; see `QuestPolicy`.

    Args:
        budget (`int`): tokens that a decode step reads in a layer. Memory grows with the sequence.
        dense_layers (`int`): layers at the bottom that read everything.
        options: as `PagedCache`.
    """

    def __init__(self, budget: Budget, *, dense_layers: int = 2, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=QuestPolicy(dense_layers), **options)
