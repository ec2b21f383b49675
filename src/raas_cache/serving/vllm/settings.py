"""The settings of the vLLM plug-in: environment variables, which all processes of vLLM share."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, field
from typing import Any

from ...cache.head_groups import new_layer
from ...cache.paged_cache import PagedCache
from ...cache.paged_layer import PagedLayer
from ...cache.settings import Budget, checked_shares, settings_of_layer
from ...engine.page_table import PageTable
from ...methods.registry import from_name
from ..row_plan import need


@dataclass(frozen=True)
class Variable:
    """An environment variable.

    Args:
        name: its name.
        kind: what its value is, for error messages.
    """

    name: str
    kind: str

    @property
    def is_set(self) -> bool:
        """Whether the variable has a value."""
        return bool(os.environ.get(self.name))

    def read(self, default: Any = None) -> Any:
        """The value, decoded as JSON; `default` if the variable is not set.

        Raises:
            ValueError: the value is of another kind.
        """
        if not self.is_set:
            return default
        text = os.environ[self.name]
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if isinstance(value, str) or (self is OPTIONS) != isinstance(value, dict):
            raise ValueError(f"{self.name}={text!r} must be {self.kind}.")
        return value


BUDGET = Variable("RAAS_BUDGET", "a number of tokens, or a JSON list with one number per layer, such as 1024")
METHOD = Variable("RAAS_METHOD", "the name of a method, such as raas")
MAX_PROMPT = Variable("RAAS_MAX_PROMPT", "a number of tokens, such as 2048")
OPTIONS = Variable("RAAS_OPTIONS", """a JSON object, such as {"page_size": 16, "alpha": 0.1}""")
REFUSED = {
    "config": "vLLM knows the model",
    "offloading": "vLLM has its own --cpu-offload-gb",
    "kv_dtype": "the rows lie in vLLM's memory, which has no place for scales",
}


@dataclass
class RowSettings:
    """The settings of all rows.

    Args:
        budget: number of tokens that each row, layer and KV head holds, see `PagedCache`.
        method: name of the method.
        max_prompt: number of prompt tokens that a row holds as a prompt; None for those that the budget has room for.
        options: arguments of the method and of `PagedCache`.
        has_windows: whether the model has layers with sliding windows, which become known while vLLM loads it.
    """

    budget: Budget
    method: str = "raas"
    max_prompt: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    has_windows: bool = False

    @classmethod
    def from_environment(cls) -> RowSettings:
        """The settings in the `RAAS_` variables.

        Raises:
            TypeError, ValueError: a value is of another kind, or is refused by the method or by `PagedCache`.
        """
        settings = cls(
            BUDGET.read(), os.environ.get(METHOD.name) or "raas", MAX_PROMPT.read(), OPTIONS.read(default={})
        )
        settings.check()
        return settings

    def check(self) -> None:
        """Raise a TypeError or ValueError if a setting cannot be used."""
        for option, reason in REFUSED.items():
            if option in self.options:
                raise ValueError(f"RAAS_OPTIONS has {option!r}, which vLLM's rows do not support: {reason}.")
        cache = self._cache
        if cache.settings.grows:
            raise ValueError(
                f"RAAS_METHOD={self.method}: this method never evicts, so a row would need the memory of the whole "
                "sequence. Use another method, or vLLM without RAAS_BUDGET."
            )
        if cache.settings.policy.uses_rotation:
            raise ValueError(
                f"RAAS_METHOD={self.method}: this method needs the rotary embedding of the model, which vLLM does not "
                "give to an attention backend. Use another method, such as raas."
            )
        prompt = self.max_prompt
        if prompt is not None and (not isinstance(prompt, int) or isinstance(prompt, bool) or prompt < 1):
            raise ValueError(f"RAAS_MAX_PROMPT={prompt} must be a number of tokens, such as 2048.")

    @functools.cached_property
    def _cache(self) -> PagedCache:
        return from_name(self.method, self.budget, **self.options)

    @functools.cached_property
    def _shares(self) -> tuple[tuple[float, ...], ...] | None:
        return checked_shares(self.options.get("shares"), self._cache.settings, offloading=False)

    @property
    def longest_prompt(self) -> int:
        """Number of prompt tokens that a row holds as a prompt. A longer prompt's other tokens are decoded."""
        settings, budget = self._cache.settings, self._cache.budget
        least = min(budget) if isinstance(budget, tuple) else budget
        room = least - settings.min_decode_pages * settings.page_size
        return max(settings.page_size, room) if self.max_prompt is None else self.max_prompt

    @property
    def evicts_prompts(self) -> bool:
        """Whether pages of a prompt are evicted when it has ended."""
        return self._cache.settings.prompt == "evict"

    def layer(self, index: int) -> PagedLayer:
        """An empty paged layer for the layer `index` of the model.

        Raises:
            ValueError: the budget or the shares have no entry for this layer.
        """
        return new_layer(settings_of_layer(self._cache.settings, self._cache.budget, self._shares, index))

    def pages(self, table: PageTable) -> int:
        """Largest number of pages that a row of `table` can need."""
        size = table.page_size
        prompts = range(1, -(-self.longest_prompt // size) + 1)
        return max(need([table], pages * size, None)[0] for pages in prompts)

    def slots(self, kv_heads: int, block_size: int) -> int:
        """Slots of a row for each of the `kv_heads` KV heads of a layer, in the layer that needs the most.

        If KV heads have different shares, the number is their average. Beside sliding windows it is a multiple of
        `block_size`, the size of their blocks: vLLM pads blocks whose sizes do not divide each other.
        """
        budget = self._cache.budget
        count = len(self._shares or (budget if isinstance(budget, tuple) else (budget,)))
        size, most = self._cache.settings.page_size, 0
        for layer in map(self.layer, range(count)):
            by_part = zip(layer.parts, heads_of(layer, kv_heads), strict=True)
            most = max(most, sum(self.pages(part.table) * heads for part, heads in by_part))
        slots = -(-most // kv_heads) * size
        return -(-slots // block_size) * block_size if self.has_windows else slots

    def __str__(self) -> str:
        chosen = f", options {json.dumps(self.options)}" if self.options else ""
        return (
            f"raas-cache: each request has a row of pages, with budget {self.budget}, method {self.method}{chosen}; "
            f"longest prompt: {self.longest_prompt} tokens."
        )


@functools.cache
def current() -> RowSettings:
    """The settings of this process."""
    return RowSettings.from_environment()


def heads_of(layer: PagedLayer, kv_heads: int) -> list[int]:
    """Number of KV heads of each part of a layer that has `kv_heads` KV heads in this process.

    Raises:
        ValueError: the layer has shares for another number of KV heads.
    """
    groups = getattr(layer, "head_groups", None)
    heads = [kv_heads] if groups is None else [len(group) for group in groups]
    if sum(heads) != kv_heads:
        raise ValueError(
            f"RAAS_OPTIONS: shares has {sum(heads)} entries for a layer, but a process has {kv_heads} of its KV heads. "
            "Give one share per KV head; with --tensor-parallel-size, give one share per layer."
        )
    return heads
