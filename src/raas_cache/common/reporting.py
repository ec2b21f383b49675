"""Tables and figures of `bench` and `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .extras import require


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind people can distinguish. Markers, for printing in grey.
STYLES = (
    ("#000000", "o"), ("#999999", "s"), ("#E69F00", "D"), ("#0072B2", "^"), ("#D55E00", "v"), ("#009E73", "P"),
    ("#CC79A7", "X"), ("#56B4E9", "*"), ("#F0E442", "h"),
)  # fmt: skip


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table in GitHub's Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def require_matplotlib() -> None:
    """Raise an ImportError with the pip command if matplotlib is missing."""
    require("matplotlib", "Plots need matplotlib", "viz")


def save(drawn: dict[str, Figure], folder: Path) -> list[Path]:
    """Save each figure as PNG and SVG under its name. Returns the paths. Equal figures give equal bytes."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with rc_context({"svg.hashsalt": "raas-cache"}):
        for name, figure in drawn.items():
            for kind, metadata in (("png", None), ("svg", {"Date": None})):
                paths.append(folder / f"{name}.{kind}")
                figure.savefig(paths[-1], dpi=150, metadata=metadata)
    return paths
