"""Find the damaged line of a data file, and describe the damage. The parsers of `datasets` do not report it."""

from __future__ import annotations

import csv
import json
from pathlib import Path


def check_encoding(path: Path) -> None:
    """Raise a ValueError with the number of the first line that is not UTF-8, if the file is a text file."""
    if path.suffix in _FORMATS and (fault := _encoding_fault(path)):
        raise ValueError(fault)


def fault(path: Path) -> str | None:
    """A description of the first damaged line, or None if there is none or the file is not a text file."""
    if path.suffix not in _FORMATS:
        return None
    if not_utf8 := _encoding_fault(path):
        return not_utf8
    with path.open(encoding="utf-8-sig", newline="") as file:
        text = file.read()
    return _FORMATS[path.suffix](text) if text.strip() else "it is empty"


def _encoding_fault(path: Path) -> str | None:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number} has byte 0x{line[error.start]:02x}, which is not UTF-8: save the file as UTF-8"
    return None


def _json_lines(text: str) -> str | None:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and (fault := _json(line, number)):
            return fault
    return None


def _json(text: str, line: int | None = None) -> str | None:
    """A description of the damage of a whole file, or of line `line` of a file, which must be a JSON object."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return f"line {line or error.lineno}, column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:  # half a surrogate pair, or too many nested brackets
        return f"line {line or 1}: {error}"
    return f"line {line}: this is not a JSON object" if line and not isinstance(found, dict) else None


def _csv(text: str) -> str | None:
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    columns, line = 0, 1
    try:
        for row in reader:
            columns = columns or len(row)
            if len(row) > columns:
                return f"line {line}: {len(row)} fields, where the first line has {columns}"
            line = reader.line_num + 1
    except csv.Error as error:
        return f"line {line}: {error}"
    return None


_FORMATS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}
