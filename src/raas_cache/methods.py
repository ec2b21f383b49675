"""The caches by name: one class a method, all of them a `PagedCache` with a policy."""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, Any

from .cache import PagedCache
from .policies import (
    POLICIES,
    DensePolicy,
    H2OPolicy,
    QuestPolicy,
    RaaSPolicy,
    RKVPolicy,
    StreamingLLMPolicy,
    TOVAPolicy,
)
from .settings import CacheOptions


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .settings import Budget


class RaaSCache(PagedCache):
    """A KV cache of bounded size for long chains of thought (RaaS, Hu et al., Findings of ACL 2025, section 3).

    Pages of KV get the present step as timestamp whenever their attention score makes them a milestone; when the
    budget is full the page with the oldest timestamp is evicted; the prompt never is, unless `prompt` says so. Time and
    memory a step are O(budget), however many tokens have been seen. As long as nothing is evicted, outputs are
    `DynamicCache`'s.

    Example:

    ```python
    >>> from raas_cache import RaaSCache
    >>> out = model.generate(**inputs, past_key_values=RaaSCache(budget=1024), max_new_tokens=32_000)
    ```

    Args:
        budget (`int`): tokens to hold for each row, layer and KV head, the prompt counted in; at least one page.
        alpha (`float`, *optional*): a page with an attention weight of at least `alpha` on one of its tokens is
            stamped. In (0, 1).
            The default is chosen in docs/stamping-study.md; the paper's is 1e-4.
        top_ratio (`float`, *optional*): instead of `alpha`, stamp this share of the held decode pages, the ones with
            the highest scores. In (0, 1].
        options: as `PagedCache`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, see also `PagedCache`.
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
    """The options that `RaaSCache` takes."""

    alpha: float | None
    top_ratio: float | None


class QuestCache(PagedCache):
    """Quest: keep everything, read the `budget` tokens' worth of pages that matter most now; see `QuestPolicy`.

    Args:
        budget (`int`): tokens that a decode step reads in a layer. Memory grows with the sequence.
        dense_layers (`int`): layers at the bottom that read everything.
        options: as `PagedCache`.
    """

    def __init__(self, budget: Budget, *, dense_layers: int = 2, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=QuestPolicy(dense_layers), **options)


class H2OCache(PagedCache):
    """H2O: keep the pages with the most attention so far, and the newest; see `H2OPolicy`.

    Args:
        budget (`int`): tokens to hold for each row, layer and KV head.
        recent_ratio (`float`): share of the pages kept for being new.
        options: as `PagedCache`.
    """

    def __init__(self, budget: Budget, *, recent_ratio: float = 0.5, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=H2OPolicy(recent_ratio), **options)


class StreamingLLMCache(PagedCache):
    """StreamingLLM: keep the first page and the newest ones; see `StreamingLLMPolicy`. Takes what `PagedCache` does."""

    def __init__(self, budget: Budget, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=StreamingLLMPolicy(), **options)


class TOVACache(PagedCache):
    """TOVA: evict what the newest query attends to least; see `TOVAPolicy`. Takes what `PagedCache` does."""

    def __init__(self, budget: Budget, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=TOVAPolicy(), **options)


class RKVCache(PagedCache):
    """R-KV: evict what is unimportant and redundant; see `RKVPolicy`.

    Args:
        budget (`int`): tokens to hold for each row, layer and KV head.
        importance_weight (`float`): share of importance in what decides, the rest is for redundancy.
        options: as `PagedCache`.
    """

    def __init__(self, budget: Budget, *, importance_weight: float = 0.1, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=RKVPolicy(importance_weight), **options)


class DenseCache(PagedCache):
    """Keep and read everything, on the store of the other methods; see `DensePolicy`. `budget` bounds nothing here."""

    def __init__(self, budget: Budget, **options: Unpack[CacheOptions]):
        super().__init__(budget, policy=DensePolicy(), **options)


CACHES: dict[str, type[PagedCache]] = {
    "dense": DenseCache,
    "streaming_llm": StreamingLLMCache,
    "h2o": H2OCache,
    "tova": TOVACache,
    "rkv": RKVCache,
    "quest": QuestCache,
    "raas": RaaSCache,
}


def list_methods() -> list[str]:
    """Names that `from_name` takes: the methods of this package, and those added with `register_policy`."""
    return list(POLICIES)


def from_name(name: str, budget: Budget, **options: Any) -> PagedCache:
    """A cache of the method `name`, so that to compare methods is to swap one word.

    Args:
        name: one of `list_methods()`.
        budget: tokens to hold, see `PagedCache`.
        options: the method's own arguments and those of `PagedCache`.

    Raises:
        ValueError: there is no such method.
        TypeError: the method has no such option.
    """
    if name not in POLICIES:
        near = difflib.get_close_matches(str(name), POLICIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(POLICIES)}."
        raise ValueError(f"name={name!r} is not a method: {hint}")
    of_policy = inspect.signature(POLICIES[name]).parameters
    taken = sorted({*of_policy, *CacheOptions.__annotations__})
    for option in options:
        if option not in taken:
            near = difflib.get_close_matches(option, taken, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(taken)}."
            raise TypeError(f"name={name!r} has no option {option!r}: {hint}")
    if name in CACHES:
        return CACHES[name](budget, **options)
    chosen = {key: options.pop(key) for key in of_policy if key in options}
    return PagedCache(budget, policy=POLICIES[name](**chosen), **options)
