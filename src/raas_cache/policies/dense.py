"""Dense: every page is kept and read, on the same store as every other method."""

from dataclasses import dataclass

from .base import Pages, Policy, register_policy


@register_policy("dense")
@dataclass(frozen=True)
class DensePolicy(Policy):
    """Evict nothing: O(N) time and memory, the accuracy that all other methods are measured against."""

    prompts = ("pin",)
    evicts = False

    def on_scores(self, pages: Pages) -> None:
        pass
