"""Evaluation: measure how many answers a model gets right with each cache, and what each cache costs.

`tasks/` loads data sets, and `textfiles.py` finds the damaged line of a data file. `answers.py` marks answers, and
`math_answer/` offers the marker as an `evaluate` metric. `settings.py` defines the methods and budgets to compare.
`runner.py` runs them in one process or several. `decoding.py` generates one batch, and `sampling.py` draws its tokens.
`rows.py` has the rows. `folder.py` stores them, and `inputs.py` lists everything that they depend on. `results.py`
summarizes the rows of each setting in a table, with the pass@k and maj@k of `votes.py`. `comparison.py` compares two
settings pair by pair, and `plots.py` draws figures. `html_report.py` writes all of this as one HTML page, with the
style and script of `report_page/`. `command.py` is `raas-cache eval`, `presets.py` has its presets, and
`model_options.py` its options of a model, which other commands share. `harness.py` is the model type for
lm-evaluation-harness. `chains.py` generates the problems of the embedded model.
"""

from importlib.resources import files

from .comparison import Comparison, compare, compared
from .decoding import Decoding
from .results import Summary, Tally, summarize, table
from .rows import Row, by_setting, read_rows
from .runner import run
from .settings import Setting, parse_methods, settings
from .tasks import Task, chain_task, load_task


__all__ = [
    "Comparison",
    "Decoding",
    "Row",
    "Setting",
    "Summary",
    "Tally",
    "Task",
    "by_setting",
    "chain_task",
    "compare",
    "compared",
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
