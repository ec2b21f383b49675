"""The program `raas-cache`. It imports a command when the command is called, so `raas-cache --help` is fast.

This is a package of its own, because importing `raas_cache` also imports torch and transformers, and registers the
caches with them.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command


class Command(NamedTuple):
    """A command of the program.

    Args:
        function: where the function of the command stands, as `module:name`.
        summary: the first sentence of its docstring, which `raas-cache --help` shows.
    """

    function: str
    summary: str

    def load(self) -> Callable[..., None]:
        """Import the function."""
        module, _, name = self.function.partition(":")
        found: Callable[..., None] = getattr(import_module(module), name)
        return found


COMMANDS = {
    "demo": Command(
        "raas_cache.cli.demo:demo", "Stream one chain of thought, then compare RaaS with transformers' DynamicCache."
    ),
    "eval": Command(
        "raas_cache.eval.command:evaluate", "Measure accuracy, chain length and memory of every method at every budget."
    ),
    "fidelity": Command(
        "raas_cache.fidelity.command:fidelity",
        "Measure how much each cache changes what a model predicts, on chains of thought that it reads token by token.",
    ),
    "probe": Command(
        "raas_cache.probes.command:probe",
        "Measure how many facts a model recalls with each cache: lemmas of a chain, and needles among distractors.",
    ),
    "shares": Command(
        "raas_cache.cli.shares:shares",
        "Learn from chains of thought how many pages each KV head needs, for RaaSCache(budget, shares=FILE).",
    ),
    "serve": Command("raas_cache.cli.serve:serve", "Serve a model with OpenAI's API, in a KV cache of fixed memory."),
    "plan": Command(
        "raas_cache.cli.plan:plan", "Compute from a model's config how much memory a budget needs and saves."
    ),
    "bench": Command(
        "raas_cache.cli.bench:bench",
        "Time decode steps after many tokens, with every method, DynamicCache (dynamic) and StaticCache.",
    ),
    "plot": Command(
        "raas_cache.cli.results:plot", "Draw the results of eval and bench as PNG and SVG files in the same folder."
    ),
    "compare": Command(
        "raas_cache.cli.results:compare",
        "Compare the methods of an evaluation with one of them, on the same problems and with the same random numbers.",
    ),
    "report": Command(
        "raas_cache.cli.results:html_report",
        "Write the results of eval as one HTML page, report.html in the same folder, to look at and to send.",
    ),
}


class CommandsOnDemand(TyperGroup):
    """The commands by name. Until a command is called, only its summary stands here."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Import the command that `args` begins with."""
        if args[0] in COMMANDS:
            alone = typer.Typer(add_completion=False, rich_markup_mode=None)
            alone.command(args[0])(COMMANDS[args[0]].load())
            self.commands[args[0]] = get_command(alone)
        return super().resolve_command(ctx, args)


app: typer.Typer = typer.Typer(cls=CommandsOnDemand, add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def main() -> None:
    """The KV cache that lets a reasoning model think for 100,000 tokens in the memory of 1,000."""


def _summary_only() -> None:
    """Stands for a command in the list of commands."""


for _name, _command in COMMANDS.items():
    app.command(_name, help=_command.summary)(_summary_only)
