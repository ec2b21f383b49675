"""Problems whose answer is a Python program that must pass tests, as in LiveCodeBench."""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import re
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

from . import run_program
from .columns import column_of
from .hub_set import HubSet
from .run_program import Case
from .task import Task, hash_of


QUESTION, STARTER, PUBLIC, PRIVATE, METADATA = COLUMNS = (
    "question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata",
)  # fmt: skip
"""The columns of LiveCodeBench that are used."""
SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)
WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
WITHOUT_STARTER = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)
_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


def programs_task(name: str, rows: Any, entry: HubSet) -> Task:
    """A task whose mark runs the last code block of the output on all public and private tests of the problem."""
    if sys.platform != "linux":
        raise ValueError(f"dataset={name!r} needs Linux to limit the memory of programs, and this is {sys.platform}.")
    for column in COLUMNS:
        column_of(name, rows, (column,))
    warnings.warn(
        f"dataset={name!r}: programs that the model writes will run on this machine as this user, each test with "
        f"{run_program.SECONDS} seconds and {run_program.MEMORY >> 30} GiB, but without a sandbox.",
        stacklevel=4,
    )
    questions, tests_of = [], []
    for index, row in enumerate(rows):
        questions.append(_prompt(row[QUESTION], row[STARTER] or ""))
        try:
            tests_of.append(_tests(row))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"dataset={name!r} has damaged tests in row {index} ({type(error).__name__}: {error}): restore the row."
            ) from error
    # The tests of a problem can be megabytes, so a row stores their hash. Other tests are another gold answer.
    golds = [f"{len(tests)} tests, hash {hash_of(repr(tests))}" for tests in tests_of]
    by_gold = dict(zip(golds, tests_of, strict=True))

    def mark(output: str, gold: str) -> tuple[str | None, bool]:
        program = program_of(output)
        return program, program is not None and gold in by_gold and run_program.passes(program, by_gold[gold])

    files = (Path(__file__), *(Path(__file__).with_name(f"{file}.py") for file in ("run_program", "program_process")))
    marker = "programs " + hash_of("".join(file.read_text(encoding="utf-8") for file in files))
    return Task(name, questions, golds, entry.max_new_tokens, "", mark, marker)


def program_of(output: str) -> str | None:
    """The last code block in the output of a model, after `</think>` if there is one, or None."""
    _, _, after = output.rpartition("</think>")
    blocks: list[str] = _BLOCK.findall(after) or _BLOCK.findall(output)
    return blocks[-1] if blocks else None


def _prompt(question: str, starter: str) -> str:
    """The prompt of LiveCodeBench for models with a chat template, as one user message."""
    code, wanted = (starter, WITH_STARTER) if starter.strip() else ("# YOUR CODE HERE", WITHOUT_STARTER)
    return (
        f"{SYSTEM}\n\n### Question:\n{question}\n\n### Format: {wanted}\n```python\n{code}\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n"
    )


def _tests(row: dict[str, Any]) -> list[Case]:
    """All tests of a problem.

    Raises:
        ValueError, KeyError, TypeError: a column is damaged, or there is no test.
    """
    function = json.loads(row[METADATA]).get("func_name")
    cases = [*json.loads(row[PUBLIC]), *json.loads(_unpacked(row[PRIVATE]))]
    if not cases:
        raise ValueError("no tests")
    return [
        Case(case["input"], case["output"], function if case["testtype"] == "functional" else None) for case in cases
    ]


def _unpacked(text: str) -> str:
    """Private tests are JSON, or the base64 of a compressed pickle of JSON."""
    if text.lstrip().startswith("["):
        return text
    try:
        content = zlib.decompress(base64.b64decode(text, validate=True))
        unpacked: str = _TextUnpickler(io.BytesIO(content)).load()
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"unreadable private tests: {error}") from error
    return unpacked


class _TextUnpickler(pickle.Unpickler):
    """Loads a pickle of a text. A pickle of anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every class and function."""
        raise pickle.UnpicklingError(f"{module}.{name} is not a text")
