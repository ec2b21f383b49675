"""The methods by name: the registry of their policies and caches, and `from_name`, which builds a cache."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..cache.paged_cache import PagedCache
from ..cache.settings import CacheOptions
from ..engine.policy import Policy


if TYPE_CHECKING:
    from ..cache.settings import Budget

POLICIES: dict[str, type[Policy]] = {}
CACHES: dict[str, type[PagedCache]] = {}
AnyPolicy = TypeVar("AnyPolicy", bound=Policy)
AnyCache = TypeVar("AnyCache", bound=PagedCache)


def register_policy(name: str) -> Callable[[type[AnyPolicy]], type[AnyPolicy]]:
    """Class decorator that makes a policy available as `from_name(name, budget=...)`.

    Raises:
        TypeError: the decorated class is not a subclass of `Policy`.
        ValueError: `name` belongs to another policy.
    """

    def register(policy: type[AnyPolicy]) -> type[AnyPolicy]:
        if not (isinstance(policy, type) and issubclass(policy, Policy)):
            raise TypeError(f"policy={policy!r} must be a subclass of raas_cache.Policy.")
        # If a notebook cell runs twice, the same class is registered again.
        if name in POLICIES and POLICIES[name].__qualname__ != policy.__qualname__:
            raise ValueError(f"name={name!r} belongs to {POLICIES[name].__name__} already: choose another name.")
        policy.name = name
        POLICIES[name] = policy
        return policy

    return register


def register_cache(name: str) -> Callable[[type[AnyCache]], type[AnyCache]]:
    """Class decorator for the cache class of a method of this package, which `from_name(name, budget)` creates."""

    def register(cache: type[AnyCache]) -> type[AnyCache]:
        CACHES[name] = cache
        return cache

    return register


def list_methods() -> list[str]:
    """Names that `from_name` accepts: methods of this package, and methods added with `register_policy`."""
    return list(POLICIES)


def from_name(name: str, budget: Budget, **options: Any) -> PagedCache:
    """Create a cache of the method `name`.

    Args:
        name: one of `list_methods()`.
        budget: number of tokens to hold, see `PagedCache`.
        options: arguments of the method, and options of `PagedCache`.

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
