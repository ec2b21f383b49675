"""What an eviction policy is, and what it sees."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar, Literal

import torch

from raas_kernels import PagedKV


@dataclass(slots=True)
class Pages:
    """The pages of one layer after a forward: pinned pages, evictable pages, and pages that hold nothing yet.

    A policy updates `priority` and `state` in place. It may write any page: `append` looks at the evictable ones only.

    Args:
        kv: the buffers; a policy that calls a kernel hands them on.
        scores: `[batch, kv_heads, pages]`, attention score of each page for this forward's queries, reduced over
            tokens, query group and queries as the policy asks for; 0 for a page that was not read.
        limit: `[batch, 1, 1]` int64, evictable pages that each row may hold; more pages are evictable while a prompt
            is cut down to the budget.
        queries: how many queries the scores come from; 1 in a decode step.
        mean_keys: returns the mean of each page's visible keys, `[batch, kv_heads, pages, head_dim]`, 0 for a page
            without any.
        state: the policy's own numbers by name, `[batch, kv_heads, pages]` float64 each, to be updated in place. They
            are 0 for a new page, and stay with their page when rows move or tokens are taken back.
    """

    kv: PagedKV
    scores: torch.Tensor
    limit: torch.Tensor
    queries: int
    mean_keys: Callable[[], torch.Tensor]
    state: dict[str, torch.Tensor]

    @property
    def priority(self) -> torch.Tensor:
        """`[batch, kv_heads, pages]` float64, to be updated in place: when a page must go, the evictable page with the
        smallest priority goes, among equals the oldest. -inf marks a page that holds nothing: leave it. A page comes
        with the sequence index of its newest token.
        """
        return self.kv.priority

    @property
    def first(self) -> torch.Tensor:
        """`[batch, kv_heads, pages]` int32, sequence index of each page's first token."""
        return self.kv.first

    @property
    def clock(self) -> torch.Tensor:
        """`[batch, kv_heads, 2]` int64, (sequence index, decode-token index) of the present token."""
        return self.kv.clock

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.kv.page_size

    @property
    def held(self) -> torch.Tensor:
        """Which pages are evictable and hold tokens, `[batch, kv_heads, pages]` bool."""
        return self.kv.held

    def newest(self, count: int | torch.Tensor) -> torch.Tensor:
        """The `count` held pages that were opened last, `[batch, kv_heads, pages]` bool.

        Args:
            count: a number, or `[batch, 1, 1]` int64 where rows differ.
        """
        held = self.held
        age = self.first.masked_fill(~held, -1)
        ranked = age.sort(-1, descending=True).values
        nth = torch.as_tensor(count, device=age.device).clamp(max=age.shape[-1]).expand(*age.shape[:2], 1)
        oldest = ranked.gather(-1, (nth - 1).clamp(min=0))
        return held & (age >= oldest) & (nth > 0)


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
