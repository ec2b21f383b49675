"""The process that runs one program of a model on one test: `python -I program_process.py LIMITS FUNCTION`.

It is a file of its own without imports of this package, so that it starts in milliseconds. The folder contains
`program.py`. A program without FUNCTION reads the test from stdin and prints its output. With FUNCTION, the test is the
arguments, one JSON value per line, and the returned value is written to `result.json`.
"""

import importlib
import json
import resource
import sys
from pathlib import Path
from typing import Any


MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "builtins", "typing",
)  # fmt: skip
"""LiveCodeBench lets a program use the names of these modules without an import."""


def main() -> None:
    """Set the limits, run the program, and call its function if the test names one."""
    seconds, memory, size = map(int, sys.argv[1].split(","))
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, size),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    sys.setrecursionlimit(50_000)
    names: dict[str, Any] = {}
    for module in MODULES:
        exec(f"from {module} import *", names)
    names |= {module: importlib.import_module(module) for module in MODULES} | {"__name__": "__main__"}
    exec(compile(Path("program.py").read_text(encoding="utf-8"), "program.py", "exec"), names)
    if len(sys.argv) > 2:
        values = [json.loads(line) for line in sys.stdin.read().split("\n")]
        function = getattr(names["Solution"](), sys.argv[2]) if "Solution" in names else names[sys.argv[2]]
        Path("result.json").write_text(json.dumps(function(*values)), encoding="utf-8")


if __name__ == "__main__":
    main()
