"""Data sets, as prompts, gold answers and functions that mark outputs.

`load.py` finds and reads the rows, `registry.py` has one entry (`hub_set.py`) per named data set, and `task.py` defines
a task. The other files make tasks from rows: `maths.py` (a number or an expression), `multiple_choice.py` (a letter),
`programs.py` (code that must pass tests, which `run_program.py` runs in the process `program_process.py`), `chain.py`
(the task of the embedded model) and `word_problem.py` (the task of the adapter in `examples`). `columns.py` reads and
checks columns.
"""

from .chain import chain_task
from .load import load_task
from .registry import HUB_SETS
from .task import Task, hash_of


__all__ = ["HUB_SETS", "Task", "chain_task", "hash_of", "load_task"]
