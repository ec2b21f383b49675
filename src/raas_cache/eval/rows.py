"""The rows of an evaluation, one per problem, sample and setting, stored as JSON lines."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from .settings import DYNAMIC, Setting, SettingKey


RowKey = tuple[Any, ...]
"""The key of a setting, the index of the problem or text and, for an evaluation, the number of the sample."""
AnyRow = TypeVar("AnyRow", bound="StoredRow")


class StoredRow:
    """What the rows of every folder have in common. A subclass is a frozen dataclass of JSON values.

    Args:
        index: index of the row in its data set.
        method, budget, options: the setting, see `Setting`.
    """

    index: int
    method: str
    budget: int | list[int] | tuple[int, ...] | None
    options: dict[str, Any]

    @property
    def setting(self) -> Setting:
        return Setting(self.method, tuple(self.budget) if isinstance(self.budget, list) else self.budget, self.options)

    @property
    def key(self) -> RowKey:
        """Identifies the row in a folder."""
        return *self.setting.key, self.index

    def to_json(self) -> str:
        """The row as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[AnyRow], line: bytes) -> AnyRow:
        """Parse a row from one line of JSON.

        Rows with the method `"dense"` and no budget come from a version in which `"dense"` was the name of
        `DynamicCache`. They become rows of `"dynamic"`.

        Raises:
            ValueError: the line is damaged; the message says where.
        """
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"column {error.colno}: {error.msg}") from error
        except (ValueError, RecursionError) as error:  # not UTF-8, or too many nested brackets
            raise ValueError(str(error)) from error
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
        known = fields(cls)  # type: ignore[arg-type]
        for field in known:
            if field.name not in found:
                raise ValueError(f"it has no {field.name!r}")
            if not _fits(found[field.name], str(field.type)):
                raise ValueError(f"{field.name}={found[field.name]!r} is not a valid value")
        if unknown := found.keys() - {field.name for field in known}:
            raise ValueError(f"{min(unknown)!r} is not a field of a row")
        if found["method"] == "dense" and found["budget"] is None:
            found["method"] = DYNAMIC
        return cls(**found)


@dataclass(frozen=True)
class Row(StoredRow):
    """The result of one sample of one problem with one setting.

    Args:
        index: index of the problem in its data set.
        sample: number of the sample of this problem, from 0.
        seed: the run's seed of sampling. The row's random numbers depend on seed, index and sample, and not on the
            setting: rows of two settings with the same three numbers are a pair.
        prompt_hash: hash of the text that the model received.
        method, budget, options: the setting, see `Setting`.
        output: the text that the model generated.
        answer: the answer found in the output, or None.
        gold: the gold answer.
        correct: whether the answer is correct.
        prompt_tokens: number of tokens of the prompt.
        tokens: number of generated tokens, including the end token.
        truncated: whether the limit of new tokens stopped the model.
        over_budget: whether the prompt left fewer decode pages than `min_decode_pages`, so that the cache held more
            tokens than its budget.
        seconds: time from the start of the row's batch to the row's last token.
        batch: number of the first row of the batch in which the row ran: sample * number of problems + index.
        kv_bytes: the largest number of bytes of keys and values that the cache held for the row after a token.
        mean_kv_bytes: mean of the bytes of keys and values over the generated tokens.
        evictions: pages evicted, over all layers and KV heads.
        device: name of the card or the CPU.
    """

    index: int
    sample: int
    seed: int
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
    mean_kv_bytes: float
    evictions: int
    device: str

    @property
    def key(self) -> RowKey:
        """Identifies the row in a folder."""
        return *self.setting.key, self.index, self.sample


_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "str": (str,),
    "str | None": (str, type(None)),
    "dict[str, Any]": (dict,),
    "int": (int,),
    "float": (int, float),
    "int | list[int] | tuple[int, ...] | None": (int, list, type(None)),
    "list[float]": (list,),
}
"""The types that JSON values of a row's fields may have, by the annotation of the field."""


def _fits(value: Any, of_field: str) -> bool:
    """Whether a field may have this value. All numbers of a row are finite and not negative."""
    if isinstance(value, list) and list in _TYPES[of_field]:
        return bool(value) and all(_fits(entry, "float" if "float" in of_field else "int") for entry in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 <= value < math.inf:
        return False
    return isinstance(value, _TYPES[of_field]) and isinstance(value, bool) == (of_field == "bool")


class RowFile:
    """The file to which one process appends its rows. Each row is on disk before the next row starts."""

    def __init__(self, folder: Path, process: int):
        self.path: Path = folder / f"rows-{process}.jsonl"
        if self.path.exists():
            # Remove an incomplete last line of a killed run: the next row would be appended to it.
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def append(self, row: StoredRow) -> None:
        """Append a row, and wait until it is on disk."""
        # A decoded text may end with half a character. Write it anyway.
        with self.path.open("a", encoding="utf-8", errors="surrogatepass") as file:
            file.write(row.to_json())
            file.flush()
            os.fsync(file.fileno())


def row_files(folder: Path) -> list[Path]:
    """The row files of a folder. Each process has its own file."""
    return sorted(folder.glob("rows*.jsonl"))


def read_rows(folder: Path) -> list[Row]:
    """Read the rows of a folder, see `read_rows_of`."""
    return read_rows_of(folder, Row)


def read_results(folder: Path) -> list[Row]:
    """Read the rows of a folder that must have some.

    Raises:
        ValueError: the folder contains no rows.
    """
    rows = read_rows(folder)
    if not rows:
        raise no_results(folder)
    return rows


def no_results(folder: Path) -> ValueError:
    """The error for a folder without results."""
    return ValueError(f"folder='{folder}' contains no results: run raas-cache eval --out {folder} first.")


def read_rows_of(folder: Path, kind: type[AnyRow]) -> list[AnyRow]:
    """Read the rows of a folder, from all processes.

    An incomplete last line, left by a killed run, is ignored. A damaged line is also ignored, and a warning names the
    file, the line and the problem.
    """
    rows: dict[RowKey, AnyRow] = {}
    for path in row_files(folder):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            if not line.strip():
                continue
            try:
                row = kind.from_json(line)
            except ValueError as error:
                warnings.warn(
                    f"{path}, line {number} is damaged ({error}): its row is ignored. Delete the line to stop "
                    "this warning.",
                    stacklevel=2,
                )
                continue
            rows.setdefault(row.key, row)
    return list(rows.values())


def by_setting(rows: Iterable[Row]) -> dict[SettingKey, list[Row]]:
    """Group rows by the key of their setting, in the order of the first row of each setting."""
    groups: dict[SettingKey, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.setting.key, []).append(row)
    return groups
