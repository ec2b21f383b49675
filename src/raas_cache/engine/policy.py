"""What an eviction policy is, and what it sees."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar, Literal

import torch


@dataclass(slots=True)
class Pages:
    """The E evictable pages of one layer after a forward; some may hold nothing yet.

    Args:
        priority: `[batch, kv_heads, E]` float64, to be updated in place: when a page must go, the one with the smallest
            goes, among equals the oldest. -inf marks a page that holds nothing: leave it. A page comes with the
            sequence index of its newest token.
        scores: `[batch, kv_heads, E]`, attention score of each page for this forward's queries, reduced over tokens,
            query group and queries as the policy asks for; 0 for a page that was not read.
        first: `[batch, kv_heads, E]` int32, sequence index of each page's first token.
        clock: `[batch, kv_heads, 2]` int64, (sequence index, decode-token index) of the present token, everywhere the
            same.
        state: the policy's own numbers by name, `[batch, kv_heads, E]` float64 each, to be updated in place; 0 for a
            new page. They stay with their page whatever happens to rows, crops and drafts.
        limit: pages that may be held; E is larger while a prompt is being cut down to the budget.
        page_size: tokens a page.
        queries: how many queries the scores come from; 1 in a decode step.
        mean_keys: gives the mean of each page's keys, `[batch, kv_heads, E, head_dim]`, 0 for a page of no token.
    """

    priority: torch.Tensor
    scores: torch.Tensor
    first: torch.Tensor
    clock: torch.Tensor
    state: dict[str, torch.Tensor]
    limit: int
    page_size: int
    queries: int
    mean_keys: Callable[[], torch.Tensor]

    @property
    def held(self) -> torch.Tensor:
        """Which pages hold anything, `[batch, kv_heads, E]` bool."""
        return self.priority > float("-inf")

    def newest(self, count: int) -> torch.Tensor:
        """The `count` held pages that were opened last, `[batch, kv_heads, E]` bool."""
        age = self.first.masked_fill(~self.held, -1)
        count = min(count, age.shape[-1])
        return self.held & (age >= age.topk(count, dim=-1).values[..., -1:]) if count else torch.zeros_like(self.held)


class Policy(ABC):
    """Orders the evictable pages: the smallest priority goes first, and after a forward a policy updates them.

    Attributes:
        name: what `from_name` and the tables call it.
        prompt: what becomes of input by default: `"pin"`, `"select"` or `"evict"` (see `PagedCache`).
        prompts: which of these the method can do.
        granularity: `"head"` or `"layer"` by default.
        page_score: a page's score is the `"max"` or the `"sum"` of its tokens' weights; the same over several queries.
        group_score: over the query heads of a KV head (with `granularity="layer"` over all), the `"max"` or `"mean"`.
        prompt_window: with `prompt="evict"`, how many of the last queries of input are looked at; None for all.
        evicts: whether pages are ever evicted; otherwise the store grows.
        reads: `"all"` evictable pages in a decode step, or the `"top"` of them by their min/max bounds.
        state: names of the numbers that the policy keeps for each page.
    """

    name: ClassVar[str]
    prompt: ClassVar[Literal["pin", "select", "evict"]] = "pin"
    prompts: ClassVar[tuple[str, ...]] = ("pin", "select", "evict")
    granularity: ClassVar[Literal["head", "layer"]] = "head"
    page_score: ClassVar[Literal["max", "sum"]] = "max"
    group_score: ClassVar[Literal["max", "mean"]] = "max"
    prompt_window: ClassVar[int | None] = 32
    evicts: ClassVar[bool] = True
    reads: ClassVar[Literal["all", "top"]] = "all"
    state: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def on_scores(self, pages: Pages) -> None:
        """Bring `pages.priority` and `pages.state` up to date, in place and without a host synchronisation."""

    def for_layer(self, layer_idx: int) -> "Policy":
        """The policy of one layer of the model, for methods that treat layers differently."""
        return self


def check_number(
    name: str, value: float | None, is_inside: Callable[[float], bool], must: str, kind: type = Real
) -> None:
    """Raise a TypeError if a policy's argument is no number, a ValueError if it is out of range. None passes.

    Args:
        kind: `numbers.Real`, or `numbers.Integral` for a count.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        if kind is Integral:
            raise TypeError(f"{name}={value!r} must be an int, not {type(value).__name__}.")
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}.")
    if value is not None and not is_inside(value):
        raise ValueError(f"{name}={value} must {must}.")
