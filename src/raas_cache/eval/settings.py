"""What is compared: a method with its options, at a budget."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig

from ..methods.registry import from_name


DENSE = "dense"
"""The method without a budget: transformers' own `DynamicCache`, which everything is measured against."""

SettingKey = tuple[str, int | tuple[int, ...] | None]


@dataclass(frozen=True)
class Setting:
    """A method, its budget and its options; makes the caches.

    Args:
        method: a name that `from_name` takes.
        budget: tokens to hold for each row, layer and KV head, prompt included, or a tuple of them, one for each
            layer; None for `"dense"`.
        options: what else `from_name` takes, such as `alpha` or `page_size`.
    """

    method: str
    budget: int | tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def new_cache(self, config: PreTrainedConfig | None = None) -> Cache:
        """An empty cache for the model of this config.

        Raises:
            ValueError, TypeError: the method, the budget or an option is refused, see `from_name`.
        """
        if self.method == DENSE:
            if self.budget is not None or self.options:
                given = ", ".join([f"budget={self.budget}", *self.options])
                raise ValueError(f"method='dense' takes neither a budget nor options, got {given}.")
            return DynamicCache(config=config)
        return from_name(self.method, self.budget, config=config, **self.options)  # type: ignore[arg-type]  # refuses None

    @property
    def label(self) -> str:
        """The method and its options as `parse_methods` reads them: `raas:alpha=0.0001`."""
        return ":".join([self.method, *(f"{name}={value}" for name, value in sorted(self.options.items()))])

    def label_but(self, common: Iterable[str], option: str | None = None) -> str:
        """The label without some options, of which `common` holds `name=value`; budgets by layer are told apart."""
        parts = [part for part in self.label.split(":") if part not in common and part.partition("=")[0] != option]
        return ":".join(parts) + ", by layer" * isinstance(self.budget, tuple)

    @property
    def key(self) -> SettingKey:
        """What tells settings apart; hashable."""
        return self.label, self.budget


def parse_methods(text: str, **common: Any) -> list[tuple[str, dict[str, Any]]]:
    """Methods and their options from a line such as `"dense,raas,raas:alpha=1e-4:page_size=8"`.

    Args:
        text: methods, comma-separated; options after colons.
        common: options of every method but dense, unless it names its own.

    Raises:
        ValueError: an option is not written `name=value`, is named twice, or belongs to all methods.
    """
    methods = []
    for entry in text.split(","):
        name, *rest = (part.strip() for part in entry.split(":"))
        options = {}
        for part in rest:
            option, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"method={entry.strip()!r}: write {part!r} as {part}=VALUE.")
            option = option.strip()
            if option in options:
                raise ValueError(f"method={entry.strip()!r}: {option!r} is named twice, leave one out.")
            if option in ("name", "budget", "config"):
                raise ValueError(f"method={entry.strip()!r}: {option!r} is given for all methods, leave it out here.")
            options[option] = _literal(value.strip())
        methods.append((name, options if name == DENSE else {**common, **options}))
    return methods


def settings(methods: Iterable[tuple[str, Mapping[str, Any]]], budgets: Iterable[int]) -> list[Setting]:
    """Every method at every budget, dense once; none twice.

    Raises:
        ValueError, TypeError: a method, a budget or an option is refused, see `from_name`.
    """
    found: dict[SettingKey, Setting] = {}
    for name, options in methods:
        for budget in [None] if name == DENSE else budgets:
            setting = Setting(name, budget, options)
            setting.new_cache()
            found.setdefault(setting.key, setting)
    return list(found.values())


def common_options(of: Iterable[Setting]) -> list[str]:
    """`name=value` of options that every setting with a budget names, and most with this value."""
    bounded = [setting for setting in of if setting.method != DENSE]
    counts = Counter(part for setting in bounded for part in setting.label.split(":")[1:])
    return [
        part
        for part, count in counts.items()
        if 2 * count > len(bounded) and all(part.partition("=")[0] in setting.options for setting in bounded)
    ]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval says it may raise
        return text
