"""The settings that an evaluation compares: a method, its options and a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig

from ..common.parse_methods import DYNAMIC as DYNAMIC
from ..common.parse_methods import parse_methods as parse_methods
from ..methods.registry import from_name


SettingKey = tuple[str, int | tuple[int, ...] | None]


@dataclass(frozen=True)
class Setting:
    """A method, its budget and its options. Creates caches.

    Args:
        method: a name that `from_name` accepts, or `"dynamic"` for transformers' `DynamicCache`.
        budget: number of tokens that each row, layer and KV head holds, including the prompt; or a tuple with one
            number per layer; None for `"dynamic"`.
        options: other arguments of `from_name`, such as `alpha` or `page_size`.
    """

    method: str
    budget: int | tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def new_cache(self, config: PreTrainedConfig | None = None) -> Cache:
        """Create an empty cache for the model with this config.

        Raises:
            ValueError, TypeError: the method, the budget or an option is invalid, see `from_name`.
        """
        if self.method == DYNAMIC:
            if self.budget is not None or self.options:
                given = ", ".join([f"budget={self.budget}", *self.options])
                raise ValueError(f"method={DYNAMIC!r} takes neither a budget nor options, got {given}.")
            return DynamicCache(config=config)
        return from_name(self.method, self.budget, config=config, **self.options)  # type: ignore[arg-type]  # None raises an error

    @property
    def label(self) -> str:
        """The method and its options in the syntax of `parse_methods`: `raas:alpha=0.0001`."""
        return ":".join([self.method, *(f"{name}={value}" for name, value in sorted(self.options.items()))])

    def label_but(self, common: Iterable[str], option: str | None = None) -> str:
        """The label without the options in `common` (as `name=value`) and without `option`. Marks budgets by layer."""
        parts = [part for part in self.label.split(":") if part not in common and part.partition("=")[0] != option]
        return ":".join(parts) + ", by layer" * isinstance(self.budget, tuple)

    @property
    def key(self) -> SettingKey:
        """Identifies the setting. Hashable."""
        return self.label, self.budget


def settings(methods: Iterable[tuple[str, Mapping[str, Any]]], budgets: Iterable[int]) -> list[Setting]:
    """Combine every method with every budget, and `"dynamic"` with none. Duplicates are removed.

    Raises:
        ValueError, TypeError: a method, a budget or an option is invalid, see `from_name`.
    """
    found: dict[SettingKey, Setting] = {}
    for name, options in methods:
        for budget in [None] if name == DYNAMIC else budgets:
            setting = Setting(name, budget, options)
            setting.new_cache()
            found.setdefault(setting.key, setting)
    return list(found.values())


def common_options(settings: Iterable[Setting]) -> list[str]:
    """Options as `name=value` that every setting with a budget sets, and more than half set to this value."""
    bounded = [setting for setting in settings if setting.method != DYNAMIC]
    counts = Counter(part for setting in bounded for part in setting.label.split(":")[1:])
    return [
        part
        for part, count in counts.items()
        if 2 * count > len(bounded) and all(part.partition("=")[0] in setting.options for setting in bounded)
    ]


def rivals_of(settings: Sequence[Setting], against: str) -> dict[SettingKey, Setting]:
    """The setting with which each setting is compared. A setting is not compared with itself.

    Args:
        against: a method among the settings with its options, such as `"window"` or `"raas:alpha=0.1"`. Options that
            most settings share need not be given. Each setting is compared with this method at the same budget. A
            method without a budget (`"dynamic"`) is compared with all settings, and so is a method with one budget
            after an `@`, as in `"window@1024"`.

    Returns:
        Key of a setting -> the setting of the method `against`. Settings without such a partner are left out.

    Raises:
        ValueError: no setting has this method, or no setting of this method has this budget.
    """
    label, _, budget = against.rpartition("@")
    if not budget.isdecimal():
        label, budget = against, ""
    (name, options), *_ = parse_methods(label)
    common = common_options(settings)
    given = {f"{option}={value}" for option, value in options.items()}
    found = {
        one.budget: one
        for one in settings
        if one.method == name and one.label_but({*common, *given}) == name and options.items() <= one.options.items()
    }
    if budget:
        found = {one.budget: one for one in found.values() if one.budget == int(budget)}
    if not found:
        known = dict.fromkeys(one.label_but(common) + f"@{one.budget}" * (one.budget is not None) for one in settings)
        raise ValueError(f"against={against!r} is not among the methods: use one of {', '.join(known)}.")
    for_all = next(iter(found.values())) if budget or None in found else None
    pairs = ((one, for_all or found.get(one.budget)) for one in settings)
    return {one.key: rival for one, rival in pairs if rival is not None and rival.key != one.key}
