"""RaaS: Reasoning-Aware Attention Sparsity (Hu et al., Findings of ACL 2025, arXiv 2502.11147)."""

from dataclasses import dataclass

import torch

import raas_kernels

from .base import Pages, Policy, register_policy


DEFAULT_ALPHA = 0.2  # chosen in docs/stamping-study.md; the paper's is 1e-4


@register_policy("raas")
@dataclass(frozen=True)
class RaaSPolicy(Policy):
    """Evict the page whose last milestone stamp is oldest (section 3): the priority of a page is its timestamp.

    Args:
        alpha: a page whose score is at least `alpha` is a milestone now and gets the present timestamp. In (0, 1);
            None is the default, unless `top_ratio` takes its place.
        top_ratio: instead of `alpha`, stamp this share of the held decode pages, those with the highest scores
            (the paper's variant uses 0.5). In (0, 1].
        probation: beyond the paper: tokens after which being a milestone proves that a page is needed again; until
            proven it counts as four times as many tokens older. 0 or more; 0 is the paper's rule.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of range, or both `alpha` and `top_ratio` are given.
    """

    alpha: float | None = None
    top_ratio: float | None = None
    probation: int = 0

    def __post_init__(self):
        if self.alpha is not None and self.top_ratio is not None:
            raise ValueError(f"alpha={self.alpha} and top_ratio={self.top_ratio}: give one of the two stamping rules.")
        if self.alpha is None and self.top_ratio is None:
            object.__setattr__(self, "alpha", DEFAULT_ALPHA)
        for name in ("alpha", "top_ratio", "probation"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}.")
        if self.alpha is not None and not 0 < self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} must lie in (0, 1): it is a share of the attention; try 0.2.")
        if self.top_ratio is not None and not 0 < self.top_ratio <= 1:
            raise ValueError(f"top_ratio={self.top_ratio} must lie in (0, 1]: it is a share of the pages; try 0.5.")
        if self.probation < 0:
            raise ValueError(f"probation={self.probation} must be 0 or more tokens: try 16, or 0 for none.")

    @property
    def state(self) -> tuple[str, ...]:
        return ("timestamp", "proven") if self.probation else ()

    def on_scores(self, pages: Pages) -> None:
        if not self.probation:
            raas_kernels.stamp(pages.priority, pages.scores, pages.first, pages.clock, self.alpha, self.top_ratio)
            return
        timestamp, proven, now = pages.state["timestamp"], pages.state["proven"], pages.clock[0]
        newest = (pages.first + pages.page_size - 1).double()
        timestamp.copy_(torch.maximum(timestamp, newest.clamp(max=now)))
        stamped = torch.where(pages.held, timestamp, float("-inf")).contiguous()
        raas_kernels.stamp(stamped, pages.scores, pages.first, pages.clock, self.alpha, self.top_ratio)
        proven.masked_fill_((stamped == now) & (newest <= now - self.probation), 1)
        timestamp.copy_(torch.maximum(timestamp, stamped))
        pages.priority.copy_(stamped - 4 * self.probation * (1 - proven))
