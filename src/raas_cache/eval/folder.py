"""A folder of rows: the lock for writing, the settings of the rows, and the rows that a new run can use."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .rows import Row, RowKey, read_rows, row_files
from .tasks import Task


SETTINGS_FILE = "settings.json"
LOCK_FILE = ".lock"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create a folder if necessary, and lock it. The lock is released when the process ends, for whatever reason.

    Raises:
        ValueError: another run holds the lock, the path is a file, or the folder cannot be written to.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file: give a folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK_FILE)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"out={str(out)!r} is being written to by another run: wait until it has ended, or give another folder."
        ) from None
    except OSError as error:
        raise ValueError(
            f"out={str(out)!r} cannot be written to ({error.strerror or error}): give another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def prepare(out: Path, inputs: dict[str, Any], methods: dict[str, str], task: Task, hashes: list[str]) -> None:
    """Prepare a locked folder for rows with these inputs: check and write its settings, and mark its rows again.

    Rows with other gold answers, or with another marker, are marked again. Their outputs do not change.

    Args:
        inputs: values that all rows depend on, see `inputs.of_run`, and values that the caller adds.
        methods: additional values that the rows of some methods depend on, see `inputs.of_methods`.
        hashes: hashes of the prompts of the task.

    Raises:
        ValueError: the folder contains rows that depend on other values.
    """
    known_marker = read_settings(out).get("marker")
    settings = agree(out, inputs, methods)
    if row_files(out):
        rows = read_rows(out)
        for row in rows:
            if row.index < len(hashes) and row.prompt_hash != hashes[row.index]:
                raise ValueError(f"out={str(out)!r} contains row {row.index} with another prompt: give another folder.")
        _mark_again(out, rows, task, task.marker is not None and task.marker == known_marker)
    write_settings(out, {**settings, "marker": task.marker})


def agree(out: Path, inputs: dict[str, Any], methods: dict[str, str]) -> dict[str, Any]:
    """Check that the rows of a locked folder depend on the same values. Returns the new settings of the folder.

    Args:
        inputs, methods: as in `prepare`.

    Raises:
        ValueError: the folder contains rows that depend on other values.
    """
    inputs = json.loads(json.dumps(inputs))  # the values that JSON gives back
    known = read_settings(out)
    known_methods = known.pop("methods", {})
    if not row_files(out):
        return {**inputs, "methods": methods}
    both = [(name, known.get(name), inputs.get(name)) for name in inputs]
    both += [(name, known_methods[name], methods[name]) for name in known_methods.keys() & methods.keys()]
    for name, theirs, ours in both:
        if theirs != ours:
            raise ValueError(
                f"out={str(out)!r} contains rows with {name}={theirs!r}, but this run has {ours!r}: give another "
                "folder."
            )
    return {**known, **inputs, "methods": {**known_methods, **methods}}


def write_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write the values that the rows of a folder depend on."""
    _write_whole(out / SETTINGS_FILE, (json.dumps(settings, indent=1) + "\n").encode())


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the values that the rows of a folder depend on. Returns an empty dict if there is no settings file.

    Raises:
        ValueError: the file is damaged. The message names the file and the line.
    """
    path = folder / SETTINGS_FILE
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
        if not isinstance(found, dict):
            raise ValueError("line 1: this is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"folder={str(folder)!r} has a damaged {SETTINGS_FILE} ({error}): restore it, or give another folder."
        ) from error
    return found


def _mark_again(out: Path, rows: list[Row], task: Task, marker_is_same: bool) -> None:
    """Mark rows again whose gold answer or marker has changed, and write them to the folder."""
    changed: dict[RowKey, Row] = {}
    for row in rows:
        gold = task.golds[row.index] if row.index < len(task.golds) else row.gold
        if marker_is_same and gold == row.gold:
            continue
        answer, correct = task.mark(row.output, gold)
        marked = replace(row, gold=gold, answer=answer, correct=correct)
        if marked != row:
            changed[row.key] = marked
    if not changed:
        return
    for path in row_files(out):
        lines = path.read_bytes().split(b"\n")
        for place, line in enumerate(lines[:-1]):
            try:
                key = Row.from_json(line).key
            except ValueError:  # `read_rows` has warned already
                continue
            if key in changed:
                lines[place] = changed[key].to_json().encode("utf-8", "surrogatepass").rstrip(b"\n")
        _write_whole(path, b"\n".join(lines))
    warnings.warn(
        f"out={str(out)!r}: gold answers or the marker have changed, so rows were marked again; changed rows: "
        f"{len(changed)}.",
        stacklevel=2,
    )


def _write_whole(path: Path, content: bytes) -> None:
    """Replace a file at once: a run that is killed in between leaves the old file or the new file."""
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
