"""Evaluation: how much a model still gets right with each cache, and what that costs.

`tasks.py` has the data sets, `textfiles.py` finds the damaged line of one, `answers.py` and the `evaluate` metric in
`math_answer/` mark. `settings.py` says what is compared, `runner.py` works it out on one process or many,
`decoding.py` a batch of it. `folder.py` keeps the rows, and `inputs.py` what they depend on; `results.py` and
`plots.py` show them. `command.py` is `raas-cache eval`, `harness.py` the model type of lm-evaluation-harness,
`chains.py` the task of the embedded model.
"""

from importlib.resources import files

from .decoding import Decoding
from .results import Row, Summary, by_setting, read_rows, summarize, table
from .runner import run
from .settings import Setting, parse_methods, settings
from .tasks import Task, chain_task, load_task


__all__ = [
    "Decoding",
    "Row",
    "Setting",
    "Summary",
    "Task",
    "by_setting",
    "chain_task",
    "load_task",
    "math_answer",
    "parse_methods",
    "read_rows",
    "run",
    "settings",
    "summarize",
    "table",
]


def math_answer() -> str:
    """Folder of the metric that marks answers: `evaluate.load(math_answer()).compute(predictions=, references=)`."""
    return str(files(__name__) / "math_answer")
