"""The interface of an eviction policy: `Policy`, and the `Pages` that it receives."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar, Literal

import torch

from raas_kernels import PagedKV

from . import draw
from .rotation import Rotation


@dataclass(slots=True)
class Pages:
    """The pages of one layer after a forward: pinned pages, evictable pages, and empty pages.

    A policy updates `priority` and `state` in place. It may write to any page, because `append` only compares evictable
    pages.

    Args:
        kv: the buffers of the layer, for a policy that calls an operator of `raas_kernels`.
        scores: `[batch, kv_heads, pages]`, attention score of each page for the queries of this forward, reduced over
            tokens, query group and queries as the policy specifies; 0 for a page that was not read.
        limit: `[batch, 1, 1]` int64, number of evictable pages that each row may have. There may be more evictable
            pages while a prompt is reduced to the budget (`prompt="evict"`).
        queries: number of queries that the scores come from; 1 in a decode step.
        mean_keys: returns the mean of the visible keys of each page, `[batch, kv_heads, pages, head_dim]`, 0 for a page
            without visible keys. With a function of a key as argument, it returns the mean of that function.
        value_range: returns the largest value range of the visible tokens of each page, `[batch, kv_heads, pages]`. The
            value range of a token is the largest minus the smallest component of its value.
        state: the policy's own numbers by name, each `[batch, kv_heads, pages]` float64, to be updated in place. They
            are 0 for a new page, and stay with their page when rows are reordered or tokens are taken back.
        row_state: the policy's own vectors by name, each `[batch, kv_heads, head_dim]` float64, to be updated in place.
            They stay with their row, and are restored when tokens are taken back. For a new row they have any values.
        newest_query: `[batch, heads, 1, head_dim]`, the query of a decode step, RoPE applied; None after a prefill.
        rotation: the rotary embedding of the layer, for a policy with `uses_rotation`; otherwise None.
    """

    kv: PagedKV
    scores: torch.Tensor
    limit: torch.Tensor
    queries: int
    mean_keys: Callable[..., torch.Tensor]
    value_range: Callable[[], torch.Tensor]
    state: dict[str, torch.Tensor]
    row_state: dict[str, torch.Tensor]
    newest_query: torch.Tensor | None
    rotation: Rotation | None

    @property
    def priority(self) -> torch.Tensor:
        """`[batch, kv_heads, pages]` float64, to be updated in place. If a page must be evicted, the evictable page
        with the smallest priority is evicted; of several such pages, the oldest. -inf marks an empty page: keep it.
        A new page has the sequence index of its newest token as priority.
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
        """Tokens per page."""
        return self.kv.page_size

    @property
    def held(self) -> torch.Tensor:
        """Which pages are evictable and hold tokens, `[batch, kv_heads, pages]` bool."""
        return self.kv.held

    @property
    def holds_newest(self) -> torch.Tensor:
        """Which page holds the newest token, `[batch, kv_heads, pages]` bool."""
        is_newest = self.kv.positions == self.clock[..., :1]  # [batch, kv_heads, slots]
        return torch.any(is_newest.unflatten(-1, (-1, self.page_size)), -1)

    def query(self) -> torch.Tensor | None:
        """The query of a decode step, RoPE applied, `[batch, kv_heads, group, head_dim]`; None after a prefill."""
        query = self.newest_query
        return None if query is None else query.unflatten(1, (self.kv.clock.shape[1], -1))[:, :, :, 0]

    def newest(self, count: int | torch.Tensor) -> torch.Tensor:
        """The `count` pages of `held` that were opened last, `[batch, kv_heads, pages]` bool.

        Args:
            count: a number, or `[batch, 1, 1]` int64 with one number per row.
        """
        held = self.held
        age = self.first.masked_fill(~held, -1)
        ranked = age.sort(-1, descending=True).values
        # A number becomes a tensor by a fill on the device. A copy from the host would wait for the device.
        nth = count if isinstance(count, torch.Tensor) else age.new_full((1, 1, 1), count)
        nth = nth.clamp(max=age.shape[-1]).expand(*age.shape[:2], 1)
        oldest = ranked.gather(-1, (nth - 1).clamp(min=0))
        return held & (age >= oldest) & (nth > 0)

    def largest(self, values: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
        """The `count` pages of `held` with the largest `values`, `[batch, kv_heads, pages]` bool.

        Of two pages with equal values, the page that was opened last comes first.

        Args:
            values: `[batch, kv_heads, pages]`.
            count: a number, or `[batch, 1, 1]` int64 with one number per row.
        """
        held = self.held
        by_age = self.first.argsort(-1, descending=True)
        ranked = values.double().masked_fill(~held, float("-inf")).gather(-1, by_age)
        order = by_age.gather(-1, ranked.argsort(dim=-1, descending=True, stable=True))
        return held & (order.argsort(-1) < count)

    def uniform(self, seed: int) -> torch.Tensor:
        """A random number in [0, 1) for each page, drawn again after each forward, `[batch, kv_heads, pages]` float64.

        A row draws in a batch what it draws alone. The draw does not change the random state of torch.

        Args:
            seed: in [0, 2**32). Different layers need different seeds: see `Policy.for_layer` and `draw.layer_seed`.
        """
        return draw.uniform(seed, self.clock, self.first)


class Policy(ABC):
    """Ranks the evictable pages. The page with the smallest priority is evicted first.

    Attributes:
        name: the name for `from_name`, and in tables.
        prompt: default of the prompt mode: `"pin"`, `"select"` or `"evict"` (see `PagedCache`).
        prompts: the prompt modes that the method supports.
        granularity: default of the granularity, `"head"` or `"layer"`.
        page_score: the score of a page is the `"max"` or the `"sum"` of the softmax weights of its tokens; scores of
            several queries are reduced in the same way.
        group_score: reduction over the query heads of a KV head, `"max"` or `"mean"`; with `granularity="layer"`, over
            all query heads.
        prompt_window: with `prompt="evict"`, the number of last queries of a prefill that score its pages; None for all
            queries.
        evicts: whether pages are ever evicted. If not, the memory grows with the sequence.
        reads: whether a decode step reads `"all"` evictable pages, or the `"top"` pages by their logit bounds.
        state: names of the numbers that the policy keeps for each page.
        row_state: names of the vectors that the policy keeps for each row and KV head.
        uses_rotation: whether the policy needs `Pages.rotation`. It then serves only models with a rotary embedding.
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
    row_state: ClassVar[tuple[str, ...]] = ()
    uses_rotation: ClassVar[bool] = False

    @abstractmethod
    def on_scores(self, pages: Pages) -> None:
        """Update `pages.priority` and `pages.state` in place, without making the host wait for the device."""

    def for_layer(self, layer_idx: int) -> "Policy":
        """The policy of layer `layer_idx` of the model, for methods that treat layers differently."""
        return self


def check_number(
    name: str, value: float | None, is_inside: Callable[[float], bool], must: str, kind: type = Real
) -> None:
    """Raise a TypeError if an argument of a policy is not a number, a ValueError if it is out of range. None passes.

    Args:
        must: completes the error message "name=value must ...".
        kind: `numbers.Real`, or `numbers.Integral` for a count.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        if kind is Integral:
            raise TypeError(f"{name}={value!r} must be an int, not {type(value).__name__}.")
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}.")
    if value is not None and not is_inside(value):
        raise ValueError(f"{name}={value} must {must}.")
