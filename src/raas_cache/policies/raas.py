"""RaaS: Reasoning-Aware Attention Sparsity (Hu et al., Findings of ACL 2025, arXiv 2502.11147)."""

from dataclasses import dataclass

import raas_kernels

from .base import Pages, Policy, check_number, register_policy


DEFAULT_ALPHA = 0.2  # chosen in docs/stamping-study.md; the paper's is 1e-4


@register_policy("raas")
@dataclass(frozen=True)
class RaaSPolicy(Policy):
    """Evict the page whose last milestone stamp is oldest (section 3): the priority of a page is its timestamp.

    Args:
        alpha: a page that scores at least this is a milestone now, and gets the present timestamp. In (0, 1).
        top_ratio: instead, stamp this share of the held pages, the highest scores (paper's variant: 0.5). In (0, 1].

    Raises:
        TypeError, ValueError: an argument is no number or out of range, or both `alpha` and `top_ratio` are given.
    """

    alpha: float | None = None
    top_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None and self.top_ratio is not None:
            raise ValueError(f"alpha={self.alpha} and top_ratio={self.top_ratio}: give one of the two stamping rules.")
        if self.alpha is None and self.top_ratio is None:
            object.__setattr__(self, "alpha", DEFAULT_ALPHA)
        check_number(
            "alpha", self.alpha, lambda share: 0 < share < 1, "lie in (0, 1): a share of the attention; try 0.2"
        )
        check_number("top_ratio", self.top_ratio, lambda share: 0 < share <= 1, "lie in (0, 1]: a share of the pages")

    def on_scores(self, pages: Pages) -> None:
        raas_kernels.stamp(pages.priority, pages.scores, pages.first, pages.clock, self.alpha, self.top_ratio)
