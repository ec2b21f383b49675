"""RaaS: Reasoning-Aware Attention Sparsity (Hu et al., Findings of ACL 2025, arXiv 2502.11147).

Rule: a page with an attention score of at least alpha gets the current step as its timestamp.
If a page is needed, the decode page with the oldest timestamp is evicted. The prompt is never evicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import raas_kernels

from ..cache.paged_cache import PagedCache
from ..cache.settings import CacheOptions
from ..engine.policy import Pages, Policy, check_number
from .registry import register_cache, register_policy


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..cache.settings import Budget


DEFAULT_ALPHA = 0.2  # from docs/stamping-study.md; the paper uses 1e-4


@register_policy("raas")
@dataclass(frozen=True)
class RaaSPolicy(Policy):
    """Evict the page with the oldest timestamp (section 3). The priority of a page is its timestamp.

    Args:
        alpha: a page with a score of at least `alpha` is a milestone, so its timestamp becomes the current step. In
            (0, 1).
        top_ratio: instead of `alpha`, the share of the evictable pages that are milestones: the pages with the
            highest scores (a variant of the paper, with 0.5). In (0, 1].

    Raises:
        TypeError, ValueError: an argument is not a number or out of range, or both `alpha` and `top_ratio` are given.
    """

    alpha: float | None = None
    top_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None and self.top_ratio is not None:
            raise ValueError(f"alpha={self.alpha} and top_ratio={self.top_ratio}: give only one of the two.")
        if self.alpha is None and self.top_ratio is None:
            object.__setattr__(self, "alpha", DEFAULT_ALPHA)
        check_number(
            "alpha", self.alpha, lambda weight: 0 < weight < 1, "lie in (0, 1), as an attention weight: try 0.2"
        )
        check_number(
            "top_ratio", self.top_ratio, lambda share: 0 < share <= 1, "lie in (0, 1], as a share of the pages: try 0.5"
        )

    def on_scores(self, pages: Pages) -> None:
        raas_kernels.stamp(pages.kv, pages.scores, self.alpha, self.top_ratio)


@register_cache("raas")
class RaaSCache(PagedCache):
    """A KV cache of bounded size for long chains of thought (RaaS, Hu et al., Findings of ACL 2025, section 3).

    A page whose attention score makes it a milestone gets the current step as timestamp. If the budget is full, the
    page with the oldest timestamp is evicted. The prompt is not evicted, unless `prompt="evict"`. Time and memory of a
    step are O(budget), however many tokens have been seen. As long as nothing is evicted, the output equals the output
    with `DynamicCache`.

    Example:

    ```python
    >>> from raas_cache import RaaSCache
    >>> out = model.generate(**inputs, past_key_values=RaaSCache(budget=1024), max_new_tokens=32_000)
    ```

    Args:
        budget (`int`): number of tokens that each row, layer and KV head holds, including the prompt; at least one
            page. Or a list with one number per layer.
        alpha (`float`, *optional*): a page with an attention weight of at least `alpha` on one of its tokens is a
            milestone. In (0, 1). The default is 0.2 (see docs/stamping-study.md), and the paper uses 1e-4.
        top_ratio (`float`, *optional*): instead of `alpha`, this share of the held decode pages, those with the highest
            scores, are milestones. In (0, 1].
        options: as in `PagedCache`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, see also `PagedCache`.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        alpha: float | None = None,
        top_ratio: float | None = None,
        **options: Unpack[CacheOptions],
    ):
        super().__init__(budget, policy=RaaSPolicy(alpha, top_ratio), **options)


class RaaSOptions(CacheOptions, total=False):
    """The options of `RaaSCache`."""

    alpha: float | None
    top_ratio: float | None
