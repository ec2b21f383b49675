"""Tables and figures of `bench` and `eval`."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from .extras import require


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind people can distinguish. Markers, for printing in grey.
STYLES = (
    ("#000000", "o"), ("#999999", "s"), ("#E69F00", "D"), ("#0072B2", "^"), ("#D55E00", "v"), ("#009E73", "P"),
    ("#CC79A7", "X"), ("#56B4E9", "*"), ("#F0E442", "h"),
)  # fmt: skip


KINDS: tuple[Literal["png", "svg"], ...] = ("png", "svg")


class Cell(NamedTuple):
    """A cell of a table.

    Args:
        text: what the table shows.
        value: the number by which a reader sorts. None sorts by the text.
    """

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A table, and a note below it. `str` is GitHub's Markdown.

    Args:
        header: names of the columns.
        lines: one cell per column each.
        note: what holds for all lines; empty for no note.
    """

    header: list[str]
    lines: list[list[Cell]]
    note: str = ""

    def __str__(self) -> str:
        text = markdown(self.header, [[cell.text for cell in line] for line in self.lines])
        return text + f"\n\n{self.note}" * bool(self.note)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table in GitHub's Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def require_matplotlib() -> None:
    """Raise an ImportError with the pip command if matplotlib is missing."""
    require("matplotlib", "Plots need matplotlib", "viz")


def save(drawn: dict[str, Figure], folder: Path) -> list[Path]:
    """Save each figure as PNG and SVG under its name. Returns the paths. Equal figures give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in drawn.items():
        for kind in KINDS:
            paths.append(folder / f"{name}.{kind}")
            paths[-1].write_bytes(image(figure, kind))
    return paths


def image(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """A figure as the content of a file. Equal figures give equal bytes."""
    from matplotlib import rc_context

    written = BytesIO()
    with rc_context({"svg.hashsalt": "raas-cache"}):
        figure.savefig(written, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return written.getvalue()
