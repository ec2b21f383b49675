"""Rows of an evaluation: one a problem and setting, in JSON lines, and the table they add up to."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..common.measure import wilson_interval
from ..common.reporting import markdown
from .settings import Setting, SettingKey, common_options


RowKey = tuple[str, int | tuple[int, ...] | None, int]


@dataclass(frozen=True)
class Row:
    """One problem, worked out with one setting.

    Args:
        index: of the problem in its data set.
        prompt_hash: of the text that the model was given.
        method, budget, options: the setting, see `Setting`.
        output: what the model wrote.
        answer: found in the output; None if it has none.
        correct: whether it is right.
        prompt_tokens, tokens: of the prompt, and written, the end token included.
        truncated: whether the model was stopped by the limit of new tokens.
        over_budget: whether the prompt left less room than the cache's floor of decode pages, so that more was held
            than the budget.
        seconds: from the start of the row's batch to its last token.
        batch: index of the first row of its batch; rows of a batch ran together.
        kv_bytes: of K and V that were held for the row at its end.
        evictions: pages evicted, over layers and KV heads.
    """

    index: int
    prompt_hash: str
    method: str
    budget: int | list[int] | tuple[int, ...] | None
    options: dict[str, Any]
    output: str
    answer: str | None
    gold: str
    correct: bool
    prompt_tokens: int
    tokens: int
    truncated: bool
    over_budget: bool
    seconds: float
    batch: int
    kv_bytes: int
    evictions: int

    @property
    def setting(self) -> Setting:
        return Setting(self.method, tuple(self.budget) if isinstance(self.budget, list) else self.budget, self.options)

    @property
    def key(self) -> RowKey:
        """No two rows of a folder have the same."""
        return *self.setting.key, self.index

    def to_json(self) -> str:
        """A line."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, line: bytes) -> Row:
        """The row of a line.

        Raises:
            ValueError: the line is damaged; the message says where.
        """
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"column {error.colno}: {error.msg}") from error
        except (ValueError, RecursionError) as error:  # not UTF-8, or brackets in brackets without end
            raise ValueError(str(error)) from error
        if not isinstance(found, dict):
            raise ValueError("it is no object in braces")
        for field in fields(cls):
            if field.name not in found:
                raise ValueError(f"it has no {field.name!r}")
            if not _fits(found[field.name], str(field.type)):
                raise ValueError(f"{field.name}={found[field.name]!r} is impossible")
        if unknown := found.keys() - {field.name for field in fields(cls)}:
            raise ValueError(f"{min(unknown)!r} is no field of a row")
        return cls(**found)


_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "str": (str,),
    "str | None": (str, type(None)),
    "dict[str, Any]": (dict,),
    "int": (int,),
    "float": (int, float),
    "int | list[int] | tuple[int, ...] | None": (int, list, type(None)),
}
"""What JSON has for the types of a row's fields."""


def _fits(value: Any, of_field: str) -> bool:
    """Whether a field can have this value; numbers of a row are finite, and none is negative."""
    if isinstance(value, list) and list in _TYPES[of_field]:
        return bool(value) and all(_fits(entry, "int") for entry in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 <= value < math.inf:
        return False
    return isinstance(value, _TYPES[of_field]) and isinstance(value, bool) == (of_field == "bool")


@dataclass(frozen=True)
class Summary:
    """What the rows of one setting add up to.

    Args:
        rows, correct, truncated, over_budget: how many.
        mean_tokens: written for a problem.
        tokens_per_second: of one process.
        kv_bytes: the most that was held for a row.
        evictions: pages evicted for a row, on average.
    """

    setting: Setting
    rows: int
    correct: int
    truncated: int
    over_budget: int
    mean_tokens: float
    tokens_per_second: float
    kv_bytes: int
    evictions: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the accuracy."""
        return wilson_interval(self.correct, self.rows)


class RowFile:
    """The file that one process appends its rows to, each on disk before the next is worked out."""

    def __init__(self, folder: Path, process: int):
        self.path: Path = folder / f"rows-{process}.jsonl"
        if self.path.exists():
            # What a killed run left of a line would swallow the next one.
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def append(self, row: Row) -> None:
        """Write a row down for good."""
        # A tokenizer may leave half a character, which must not cost the row.
        with self.path.open("a", encoding="utf-8", errors="surrogatepass") as file:
            file.write(row.to_json())
            file.flush()
            os.fsync(file.fileno())


def row_files(folder: Path) -> list[Path]:
    """The files of rows in a folder, one for each process that wrote there."""
    return sorted(folder.glob("rows*.jsonl"))


def read_rows(folder: Path) -> list[Row]:
    """The rows of a folder, whichever process wrote them.

    A line that a killed run left unfinished does not count. Of a damaged one a warning says file and line, and what is
    wrong; its row is as if it had never been.
    """
    rows: dict[RowKey, Row] = {}
    for path in row_files(folder):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            if not line.strip():
                continue
            try:
                row = Row.from_json(line)
            except ValueError as error:
                warnings.warn(
                    f"{path}, line {number} is damaged ({error}): its row is left out. Delete the line to be told no "
                    "more.",
                    stacklevel=2,
                )
                continue
            rows.setdefault(row.key, row)
    return list(rows.values())


def by_setting(rows: Iterable[Row]) -> dict[SettingKey, list[Row]]:
    """The rows of each setting by its key, in the order in which settings first come."""
    groups: dict[SettingKey, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.setting.key, []).append(row)
    return groups


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """A summary for each setting, in the order in which they first come."""
    return [_summary(group) for group in by_setting(rows).values()]


def table(summaries: list[Summary], **more: list[str]) -> str:
    """In GitHub's Markdown, a line a setting; options that most share are said below it.

    Args:
        more: further columns by name, a cell for each setting.
    """
    header = ["method", "budget", "accuracy (95 % interval)", "tokens", "truncated", "tokens/s", "peak KV", "evicted"]
    common = common_options(one.setting for one in summaries)
    lines = []
    for one in summaries:
        low, high = one.interval
        budgets = one.setting.budget if isinstance(one.setting.budget, tuple) else (one.setting.budget,)
        budget = "all" if budgets == (None,) else " / ".join(f"{budget:,}" for budget in budgets)
        lines.append([
            one.setting.label_but(common), budget + f" (prompts over it: {one.over_budget})" * bool(one.over_budget),
            f"{one.accuracy:.1%} ({low:.1%} to {high:.1%})", f"{one.mean_tokens:,.0f}",
            f"{one.truncated / one.rows:.1%}", f"{one.tokens_per_second:,.0f}", f"{one.kv_bytes:,}",
            f"{one.evictions:,.0f}",
        ])  # fmt: skip
    text = markdown([*header, *more], [[*line, *cells] for line, *cells in zip(lines, *more.values(), strict=True)])
    return text + f"\n\nUnless said otherwise: {', '.join(common)}." * bool(common)


def _summary(rows: list[Row]) -> Summary:
    seconds: dict[int, float] = {}  # of each batch, whose rows ran side by side
    for row in rows:
        seconds[row.batch] = max(seconds.get(row.batch, 0.0), row.seconds)
    tokens = sum(row.tokens for row in rows)
    return Summary(
        setting=rows[0].setting,
        rows=len(rows),
        correct=sum(row.correct for row in rows),
        truncated=sum(row.truncated for row in rows),
        over_budget=sum(row.over_budget for row in rows),
        mean_tokens=tokens / len(rows),
        tokens_per_second=tokens / max(sum(seconds.values()), 1e-9),
        kv_bytes=max(row.kv_bytes for row in rows),
        evictions=sum(row.evictions for row in rows) / len(rows),
    )
