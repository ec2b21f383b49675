"""The commands that read what `eval` and `bench` wrote: `plot`, `compare` and `report`."""

from pathlib import Path
from typing import Annotated

import typer

from ..common import arguments
from ..eval import plots
from ..eval.comparison import compare as paired
from ..eval.comparison import compared
from ..eval.html_report import write_report
from ..eval.rows import read_results
from ..eval.settings import DYNAMIC


def plot(
    folder: Annotated[Path, typer.Argument(help="Folder that eval or bench wrote with --out.")],
) -> None:
    """Draw the results of eval and bench as PNG and SVG files in the same folder."""
    with arguments.refusing(), arguments.plain_warnings():
        paths = plots.plot(folder)
    for path in paths:
        print(path)


def compare(
    folder: Annotated[Path, typer.Argument(help="Folder that eval wrote with --out.")],
    against: Annotated[
        str,
        typer.Option(
            help="The method to compare with, at the same budget: dynamic, window, raas:alpha=0.1. For one budget: "
            "window@1024."
        ),
    ] = DYNAMIC,
) -> None:
    """Compare the methods of an evaluation with one of them, on the same problems and with the same random numbers."""
    with arguments.plain_warnings(), arguments.refusing(folder="FOLDER", against="--against", method="--against"):
        print(compared(paired(read_results(folder), against)))


def html_report(
    folder: Annotated[Path, typer.Argument(help="Folder that eval wrote with --out.")],
    against: Annotated[
        str | None,
        typer.Option(help="The method to compare with, as in compare.", show_default="dynamic, if it was run"),
    ] = None,
) -> None:
    """Write the results of eval as one HTML page, report.html in the same folder, to look at and to send."""
    with arguments.plain_warnings(), arguments.refusing(folder="FOLDER", against="--against", method="--against"):
        print(write_report(folder, against))
