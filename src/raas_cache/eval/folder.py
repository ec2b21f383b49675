"""A folder of rows: who may write into it, what its rows depend on, and which of them a run goes on from."""

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

from .results import Row, RowKey, read_rows, row_files
from .tasks import Task


SETTINGS_FILE = "settings.json"
LOCK_FILE = ".lock"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Have a folder to oneself, which is made if it is not there; the lock goes when its process ends, however it does.

    Raises:
        ValueError: another run has it, it is a file, or it cannot be written to.
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
    """Make a folder that is locked ready for rows with these inputs: its settings are written, its rows marked anew.

    Rows with other gold answers, or of another marker, are marked again: what the model wrote stays as it is.

    Args:
        inputs: what all rows depend on, see `inputs.of_run`; names of one's own may be among it.
        methods: what the rows of some methods depend on besides, see `inputs.of_methods`.
        hashes: of the prompts of the task.

    Raises:
        ValueError: the folder holds rows that depend on something else.
    """
    inputs = json.loads(json.dumps(inputs))  # as they come back
    known = read_settings(out)
    known_marker, known_methods = known.pop("marker", None), known.pop("methods", {})
    if row_files(out):
        both = [(name, known.get(name), inputs.get(name)) for name in inputs]
        both += [(name, known_methods[name], methods[name]) for name in known_methods.keys() & methods.keys()]
        for name, theirs, ours in both:
            if theirs != ours:
                raise ValueError(
                    f"out={str(out)!r} holds rows with {name}={theirs!r}, this run has {ours!r}: give another folder."
                )
        rows = read_rows(out)
        for row in rows:
            if row.index < len(hashes) and row.prompt_hash != hashes[row.index]:
                raise ValueError(f"out={str(out)!r} has row {row.index} of another prompt: give another folder.")
        _mark_again(out, rows, task, task.marker is not None and task.marker == known_marker)
    else:
        known, known_methods = {}, {}
    of = {**known, **inputs, "marker": task.marker, "methods": {**known_methods, **methods}}
    _write_whole(out / SETTINGS_FILE, (json.dumps(of, indent=1) + "\n").encode())


def read_settings(folder: Path) -> dict[str, Any]:
    """What the rows of a folder depend on; nothing where nobody has written it down.

    Raises:
        ValueError: the file is damaged; the message names it, and the line.
    """
    path = folder / SETTINGS_FILE
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
        if not isinstance(found, dict):
            raise ValueError("line 1: this is no object in braces")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"folder={str(folder)!r} has a damaged {SETTINGS_FILE} ({error}): restore it, or give another folder."
        ) from error
    return found


def _mark_again(out: Path, rows: list[Row], task: Task, marker_is_same: bool) -> None:
    """Mark what each row has as output again, where the gold answer or the marker has changed."""
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
            except ValueError:  # `read_rows` has told of it
                continue
            if key in changed:
                lines[place] = changed[key].to_json().encode("utf-8", "surrogatepass").rstrip(b"\n")
        _write_whole(path, b"\n".join(lines))
    warnings.warn(
        f"out={str(out)!r}: gold answers or the marker have changed, so rows are marked again: {len(changed)}.",
        stacklevel=2,
    )


def _write_whole(path: Path, content: bytes) -> None:
    """In one piece: a run that is killed meanwhile leaves the old file or the new one."""
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
