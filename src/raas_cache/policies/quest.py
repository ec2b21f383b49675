"""Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (Tang et al., ICML 2024, arXiv 2406.10774)."""

from dataclasses import dataclass
from numbers import Integral

from .base import Pages, Policy, check_number, register_policy
from .dense import DensePolicy


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
