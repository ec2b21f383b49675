"""The options of a paged cache, and their checks."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from transformers import PreTrainedConfig

from ..engine.layer_settings import LayerSettings
from ..engine.policy import Policy
from .shares_file import read_shares


if TYPE_CHECKING:
    property_of_an_instance = property
else:

    class property_of_an_instance(property):
        """A property that raises an error if the class is passed to transformers instead of an instance."""

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None and owner is not None:
                raise AttributeError(
                    f"{owner.__name__} is a class, not a cache: pass an instance, {owner.__name__}(budget=1024)."
                )
            return super().__get__(instance, owner)


Budget = int | list[int] | tuple[int, ...]
Shares = Sequence[float | Sequence[float]] | str | os.PathLike[str]


class CacheOptions(TypedDict, total=False):
    """The options of every paged cache; see `PagedCache`."""

    page_size: int
    scoring: Literal["exact", "minmax"]
    granularity: Literal["head", "layer"] | None
    min_decode_pages: int
    prompt: Literal["pin", "select", "evict"] | None
    kv_dtype: Literal["int8", "fp8", "int4"] | None
    config: PreTrainedConfig | None
    offloading: bool
    shares: Shares | None


def whole_number(name: str, value: object) -> int:
    """`value` as an int; integers of NumPy and torch are accepted, too.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is not positive.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # raises a TypeError if it is not an integer
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an int, not {type(value).__name__}.") from None
    if number < 1:
        raise ValueError(f"{name}={number} must be positive.")
    return number


def checked_budget(budget: object, page_size: int) -> int | tuple[int, ...]:
    """The budget as an int, or as a tuple with one int per layer of the model.

    Raises:
        TypeError, ValueError: `budget` is something else, or less than a page.
    """
    if isinstance(budget, (list, tuple)):
        if not budget:
            raise ValueError(f"budget={budget} must be an int, or a list with one int per layer.")
        return tuple(_checked_tokens(entry, page_size) for entry in budget)
    return _checked_tokens(budget, page_size)


def _checked_tokens(budget: object, page_size: int) -> int:
    tokens = whole_number("budget", budget)
    if tokens < page_size:
        raise ValueError(f"budget={tokens} is less than one page: make it at least page_size={page_size} tokens.")
    return tokens


def checked_page_size(page_size: object) -> int:
    """The page size as an int.

    Raises:
        TypeError, ValueError: `page_size` is not a power of two.
    """
    tokens = whole_number("page_size", page_size)
    if tokens & (tokens - 1):
        raise ValueError(f"page_size={tokens} must be a power of two: try 16.")
    return tokens


def checked_config(config: object) -> PreTrainedConfig | None:
    """The config of a model, or None.

    Raises:
        TypeError: `config` is something else.
    """
    if config is not None and not isinstance(config, PreTrainedConfig):
        raise TypeError(f"config={config!r} must be a model's config (model.config), not {type(config).__name__}.")
    return config


def check_offloading(offloading: bool) -> None:
    """Raise a ValueError if `offloading` is set and there is no CUDA GPU."""
    if offloading and not torch.cuda.is_available():
        raise ValueError("offloading=True needs a CUDA GPU, and this machine has none: do not pass offloading.")


def check_choice(name: str, value: object, options: Sequence[object]) -> None:
    """Raise a ValueError if `value` is not one of `options`."""
    if value not in options:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, options))}.")


def checked_settings(
    budget: object,
    policy: Policy,
    page_size: object,
    scoring: Literal["exact", "minmax"],
    granularity: Literal["head", "layer"] | None,
    min_decode_pages: object,
    prompt: Literal["pin", "select", "evict"] | None,
    kv_dtype: Literal["int8", "fp8", "int4"] | None,
) -> tuple[int | tuple[int, ...], LayerSettings]:
    """The budget, and the settings of a layer without its budget (0). See `PagedCache` for the arguments.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or the method does not support it.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"policy={policy!r} must be a raas_cache.Policy, such as RaaSPolicy().")
    granularity = policy.granularity if granularity is None else granularity
    prompt = policy.prompt if prompt is None else prompt
    size = checked_page_size(page_size)
    checked = checked_budget(budget, size)
    least = whole_number("min_decode_pages", min_decode_pages)
    check_choice("scoring", scoring, ("exact", "minmax"))
    check_choice("granularity", granularity, ("head", "layer"))
    check_choice("prompt", prompt, ("pin", "select", "evict"))
    check_choice("kv_dtype", kv_dtype, (None, "int8", "fp8", "int4"))
    if prompt not in policy.prompts:
        able = ", ".join(map(repr, policy.prompts))
        raise ValueError(f"prompt={prompt!r} is not supported by {type(policy).__name__}: use one of {able}.")
    return checked, LayerSettings(policy, 0, size, least, scoring, granularity, prompt, kv_dtype)


def checked_shares(shares: object, settings: LayerSettings, offloading: bool) -> tuple[tuple[float, ...], ...] | None:
    """For each layer, the shares of its KV heads, or one share for all of them. See `PagedCache`.

    Raises:
        TypeError, ValueError: `shares` is something else; or the cache cannot have shares.
    """
    if shares is None:
        return None
    if isinstance(shares, (str, os.PathLike)):
        shares = read_shares(shares)
    if not isinstance(shares, Sequence) or not shares:
        raise TypeError(
            f"shares={shares!r} must be a list with one entry per layer, as learn_shares returns it, or a file."
        )
    checked = []
    for index, entry in enumerate(shares):
        listed = entry if isinstance(entry, Sequence) and entry else [entry]
        for share in listed:
            is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if not is_number or not math.isfinite(share) or share <= 0:
                raise ValueError(
                    f"shares[{index}]={entry!r} must be a positive number, or a list with one per KV head."
                )
        checked.append(tuple(float(share) for share in listed))
    by_head = any(len(set(entry)) > 1 for entry in checked)
    if settings.grows:
        raise ValueError(f"shares: {type(settings.policy).__name__} never evicts, so there is nothing to share.")
    if by_head and settings.granularity == "layer":
        raise ValueError(
            "shares differ between the KV heads of a layer, but granularity='layer' evicts the same pages in all of "
            "them: use granularity='head', or give one share per layer."
        )
    if by_head and offloading:
        raise ValueError(
            "shares differ between the KV heads of a layer, which offloading=True does not support: give one share per "
            "layer, or do not pass offloading."
        )
    return tuple(checked)


def settings_of_layer(
    settings: LayerSettings,
    budget: int | tuple[int, ...],
    shares: tuple[tuple[float, ...], ...] | None,
    layer_idx: int,
) -> LayerSettings:
    """The settings of the layer `layer_idx`: `settings`, with the budget, the shares and the policy of this layer.

    Raises:
        ValueError: `budget` or `shares` has no entry for this layer.
    """
    if shares is not None:
        if layer_idx >= len(shares):
            raise ValueError(
                f"shares has {len(shares)} entries, but the model has a layer {layer_idx}: give one entry per layer."
            )
        settings = replace(settings, shares=shares[layer_idx])
    if isinstance(budget, tuple):
        if layer_idx >= len(budget):
            raise ValueError(
                f"budget={budget} has {len(budget)} entries, but the model has a layer {layer_idx}: give one entry "
                "per layer."
            )
        budget = budget[layer_idx]
    return replace(settings, budget=budget, policy=settings.policy.for_layer(layer_idx))
