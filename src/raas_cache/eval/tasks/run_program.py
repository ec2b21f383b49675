"""Run a program of a model on tests, each test in a process with limits of time, memory and output.

This is no sandbox: the program can read and change everything that this user can.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path


SECONDS = 6
"""Time limit of a test, as in LiveCodeBench."""
MEMORY = 4 << 30
"""Address space of a process in bytes, as in LiveCodeBench."""
LARGEST_FILE = 64 << 20
"""Bytes that a program may print, or write to one file."""
_CHILD = Path(__file__).with_name("program_process.py")


@dataclass(frozen=True)
class Case:
    """A test of a program.

    Args:
        input: the text on stdin; with `function`, the arguments, one JSON value per line.
        output: the text to print; with `function`, the JSON value to return.
        function: the function to call, of the class `Solution` if there is one. None for programs that read stdin.
    """

    input: str
    output: str
    function: str | None = None


def passes(program: str, cases: Iterable[Case]) -> bool:
    """Whether a program passes all tests. Stops at the first test that fails. Needs the limits of Linux."""
    return all(_passes_one(program, case) for case in cases)


def _passes_one(program: str, case: Case) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        # Half a surrogate pair in the text of the model cannot be encoded, and is no valid program.
        (place / "program.py").write_bytes(program.encode(errors="replace"))
        (place / "input").write_text(case.input, encoding="utf-8")
        # 1. Run the process in the folder. Files bound what it prints; pipes would fill this process's memory.
        limits = f"{SECONDS + 1},{MEMORY},{LARGEST_FILE}"
        command = [sys.executable, "-I", str(_CHILD), limits, *([case.function] if case.function else [])]
        with (place / "input").open("rb") as read, (place / "output").open("wb") as write:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={"OPENBLAS_NUM_THREADS": "1"},  # no tokens or passwords of this user
                stdin=read,
                stdout=write,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            # 2. Wait, and then end every process that the program has started.
            try:
                ended = process.wait(SECONDS) == 0
            except subprocess.TimeoutExpired:
                ended = False
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        # 3. Compare.
        if not ended:
            return False
        if case.function is None:
            return _same_text((place / "output").read_text(encoding="utf-8", errors="replace"), case.output)
        try:
            return bool(json.loads((place / "result.json").read_bytes()) == json.loads(case.output))
        except (OSError, ValueError, RecursionError):  # the program has ended the process before its function returned
            return False


def _same_text(printed: str, expected: str) -> bool:
    """Whether two outputs have the same lines, without white space at their ends, or lines of equal numbers."""
    lines, wanted = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(lines) == len(wanted) and all(map(_same_line, lines, wanted))


def _same_line(line: str, wanted: str) -> bool:
    if line == wanted:
        return True
    try:
        return [Decimal(word) for word in line.split()] == [Decimal(word) for word in wanted.split()]
    except InvalidOperation:
        return False
