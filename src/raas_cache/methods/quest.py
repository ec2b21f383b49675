"""Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (Tang et al., ICML 2024, arXiv 2406.10774).

Rule: nothing is evicted. key_min and key_max of a page give an upper bound of its logits for a query (logit_bound).
A decode step reads only the pages with the highest logit_bound, up to the budget.
"""

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
    """Keep everything, and read the pages with the highest logit_bound (section 3.3).

    The page with the newest token is always read. Forwards of several tokens read all pages, as in the paper. The query
    heads of a KV head read the same pages: the pages with the largest bounds over these heads.

    Args:
        dense_layers: number of first layers that read everything, because attention is less sparse there (section 3.4
            uses 2).

    Raises:
        TypeError, ValueError: `dense_layers` is not a number or negative.
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
    """Quest: keep everything, and read the pages with the highest logit_bound; see `QuestPolicy`.

    Args:
        budget (`int`): number of tokens that a decode step reads in a layer. Memory grows with the sequence.
        dense_layers (`int`): number of first layers that read everything.
        options: as in `PagedCache`.
    """

    def __init__(self, budget: Budget, *, dense_layers: int = 2, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=QuestPolicy(dense_layers), **options)
