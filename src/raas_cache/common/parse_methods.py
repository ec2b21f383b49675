"""Parse methods and their options from a line, as the commands take them."""

from __future__ import annotations

import ast
from typing import Any


DYNAMIC = "dynamic"
"""The baseline: transformers' own `DynamicCache`, which has no budget. `"dense"` is this package's `DenseCache`."""


def parse_methods(text: str, **common: Any) -> list[tuple[str, dict[str, Any]]]:
    """Parse methods and their options from a line such as `"dynamic,raas,raas:alpha=1e-4:page_size=8"`.

    Args:
        text: methods separated by commas, each with its options after colons.
        common: options for every method except `"dynamic"`. An option in `text` has priority.

    Raises:
        ValueError: an option is not written as `name=value`, is given twice, or may not be set for a single method.
    """
    methods = []
    for entry in text.split(","):
        name, options = parse_method(entry)
        methods.append((name, options if name == DYNAMIC else {**common, **options}))
    return methods


def parse_method(entry: str) -> tuple[str, dict[str, Any]]:
    """Parse one method with its options, such as `"raas:alpha=1e-4:page_size=8"`, as `parse_methods`."""
    name, *rest = (part.strip() for part in entry.split(":"))
    options: dict[str, Any] = {}
    for part in rest:
        option, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"method={entry.strip()!r}: write {part!r} as {part}=VALUE.")
        option = option.strip()
        if option in options:
            raise ValueError(f"method={entry.strip()!r}: {option!r} is given twice: remove one of the two.")
        if option in ("name", "budget", "config"):
            raise ValueError(f"method={entry.strip()!r}: {option!r} applies to all methods: remove it here.")
        options[option] = _literal(value.strip())
    return name, options


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the documented errors of literal_eval
        return text
