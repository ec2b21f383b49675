"""Find a data set by its name, load its rows with `datasets`, and make a task of them."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from ...common.extras import require
from .. import chains, textfiles, word_problems
from .chain import chain_task
from .hub_set import HubSet
from .maths import maths_task
from .registry import HUB_SETS
from .task import Task
from .word_problem import word_problem_task


CHAIN_LINES = 50
CHAIN_PROBLEMS = 100
PEOPLE = 44
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_task(name: str, limit: int | None = None, seed: int = 0, *, run_code: bool = False) -> Task:
    """Load a data set by name.

    Args:
        name: one of

            - a name in `HUB_SETS`, which is read from the Hub
            - `NAME=FILE`: the same task from a local file with the same columns, such as `gpqa-diamond=rows.jsonl`
            - an `org/name` on the Hub (split `test`), or a local file, with a column `problem`, `question` or `prompt`,
              and a column `answer`. Answers are marked as in MATH-500
            - `"chains"` for problems of the embedded model with 50 lines (`"chains-20"`: 20 lines)
            - `"word-problems"` and `"word-problems-once"` for the adapter in `examples/word_problem_solver`, problems
              about 44 people (`"word-problems-30"`: 30 people).

            Files are `.jsonl`, `.json`, `.csv` or `.parquet`.
        limit: use only the first rows. For chains and word problems, the number of problems (100 by default).
        seed: seed of the chains and the word problems.
        run_code: allow marks that run the code that the model writes, on this machine and as this user, with limits of
            time and memory but without a sandbox. LiveCodeBench needs it.

    Raises:
        ValueError: the data set or the file does not exist, cannot be loaded, or lacks a column or an answer; or the
            data set needs `run_code`.
        ImportError: `datasets` or `math-verify` is missing.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1.")
    if chain := re.fullmatch(r"chains(?:-(\d+))?", name):
        return chain_task(chains.problems(limit or CHAIN_PROBLEMS, int(chain[1] or CHAIN_LINES), seed), name)
    if words := re.fullmatch(r"word-problems(-once)?(?:-(\d+))?", name):
        family: word_problems.Family = "once" if words[1] else "restated"
        sample = word_problems.problems(limit or CHAIN_PROBLEMS, int(words[2] or PEOPLE), family, seed)
        return word_problem_task(sample, name, family)
    label, file, entry = _find(name)
    if entry.runs_code and not run_code:
        raise ValueError(
            f"dataset={label!r} is marked by running the code that the model writes, on this machine and without a "
            "sandbox: use a machine or a container that this code may damage, and pass run_code=True (--run-code)."
        )
    rows = _load_rows(name, file, entry)
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    if not len(rows):
        raise ValueError(f"dataset={name!r} has no rows.")
    return entry.task(label, rows, entry)


def _find(name: str) -> tuple[str, Path | None, HubSet]:
    """The name of the task, its local file or None, and its entry."""
    label, equals, path = name.partition("=")
    if equals and label in HUB_SETS:
        file, entry = Path(path), HUB_SETS[label]
    elif name in HUB_SETS:
        return name, None, HUB_SETS[name]
    else:
        label, file, entry = name, Path(name), HubSet(name, maths_task)
    if file.suffix in LOADERS:
        if not file.is_file():
            raise ValueError(f"dataset={name!r} does not exist: check the path.")
        return label, file, entry
    if equals and label in HUB_SETS:
        raise ValueError(f"dataset={name!r} must name a {', '.join(LOADERS)} file after the '='.")
    if "/" in name:
        return label, None, entry
    near = difflib.get_close_matches(name, [*HUB_SETS, "chains", "word-problems"], n=1)
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"use {', '.join(HUB_SETS)}, chains, word-problems, org/name, or a .jsonl file."
    )
    raise ValueError(f"dataset={name!r} is not a data set: {hint}")


def _load_rows(name: str, file: Path | None, entry: HubSet) -> Any:
    """The rows of a local file, or of a data set on the Hub."""
    require("datasets", "Data sets need datasets", "eval")
    import datasets

    try:
        if file is not None:
            textfiles.check_encoding(file)  # a parser may find a wrong encoding only when it reads the row
            return datasets.load_dataset(LOADERS[file.suffix], data_files=str(file), split="train")
        if entry.files:
            paths = [f"hf://datasets/{entry.path}/{part}" for part in entry.files]
            return datasets.load_dataset("json", data_files=paths, split="train")
        return datasets.load_dataset(entry.path, entry.name, split=entry.split)
    except Exception as error:  # the Hub client and the parsers raise many kinds of errors
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {str(cause).strip()}".partition("\n")[0]
        mend = "use a local file with the same columns instead"
        if file is not None:
            reason, mend = textfiles.fault(file) or reason, "check that the format matches the file name"
        raise ValueError(f"dataset={name!r} cannot be loaded ({reason}): {mend}") from error
