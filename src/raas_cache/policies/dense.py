"""Dense: every page is kept and read, on the same store as every other method."""

from dataclasses import dataclass

from .base import Pages, Policy, register_policy


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
