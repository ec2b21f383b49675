"""TOVA: Transformers are Multi-State RNNs (Oren et al., EMNLP 2024, arXiv 2401.06104)."""

from dataclasses import dataclass

from .base import Pages, Policy, register_policy


@register_policy("tova")
@dataclass(frozen=True)
class TOVAPolicy(Policy):
    """Evict the page that the newest query attends to least, by the mean over the heads of the layer (section 4).

    A page is as important as its most attended token; `page_size=1` is the paper's method.
    """

    prompt = "evict"
    granularity = "layer"
    group_score = "mean"
    prompt_window = 1

    def on_scores(self, pages: Pages) -> None:
        pages.priority.copy_(pages.scores.double().masked_fill(~pages.held, float("-inf")))
