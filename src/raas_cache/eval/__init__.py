"""Evaluation: measure how many answers a model gets right with each cache, and what each cache costs.

`tasks/` loads data sets, and `textfiles.py` finds the damaged line of a data file. `answers.py` marks answers, and
`math_answer/` offers the marker as an `evaluate` metric. `settings.py` defines the methods and budgets to compare.
`runner.py` runs them in one process or several, and `decoding.py` generates one batch. `folder.py` stores the rows of a
run, and `inputs.py` lists everything that the rows depend on. `results.py` makes the table, and `plots.py` the figures.
`command.py` is `raas-cache eval`, `presets.py` has its presets, and `model_options.py` its options of a model, which
other commands share. `harness.py` is the model type for lm-evaluation-harness. `chains.py` generates the problems of
the embedded model.
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
    """Path of the metric that marks answers: `evaluate.load(math_answer()).compute(predictions=, references=)`."""
    return str(files(__name__) / "math_answer")
