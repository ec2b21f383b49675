"""One HTML page with the results of an evaluation, to look at and to send.

The page is one file: it contains its figures, its style, and a script that sorts the tables. Its content security
policy forbids the browser to load anything else.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common import reporting
from ..common.reporting import Cell, Table
from ..viz.html import plain
from . import plots
from .comparison import compare, compared_table
from .folder import read_settings
from .results import Summary, summarize, table_of, versions
from .rows import read_results
from .settings import DYNAMIC


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "report.html"
MEANING = {
    "method": "the method that chooses which pages the cache holds. dynamic holds everything",
    "budget": "tokens that the cache holds for each row, layer and KV head, prompt included",
    "budget without prompt": "the budget less the mean number of tokens of the prompts",
    "accuracy": "share of correct rows, with its 95 % interval",
    "pass@1": "share of correct samples of a problem, mean over the problems, with its 95 % interval",
    "pass@k": "probability that at least one of k samples is correct",
    "maj@k": "share of problems whose most frequent answer is correct",
    "tokens": "generated tokens per row, mean",
    "truncated": "share of rows that the limit of tokens cut off",
    "tokens/s": "generated tokens per second of one process",
    "peak KV": "largest number of bytes of keys and values held for a row",
    "mean KV": "mean number of bytes of keys and values held for a row",
    "evicted": "pages evicted per row, over all layers and KV heads",
    "against": "the other method of the pair",
    "pass@1 difference": "difference in percentage points, with its 95 % interval",
    "sign test": "two-sided p-value of the exact sign test by problem",
    "won": "pairs in which only this method is correct",
    "lost": "pairs in which only the other method is correct",
    "pairs": "pairs of rows with the same problem, sample and random numbers",
    "problems": "problems of the pairs",
}
"""What a column means, by its name without brackets, with `@k` for a number of samples above 1."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
WIDTH = 700
"""Up to this width in pixels, the page has the form for a phone. `report_page/style.css` has the same number."""
SMALLEST = 70
"""Pixels per inch of a figure, below which its text is too small."""


def write_report(folder: Path, against: str | None = None) -> Path:
    """Write the results of a folder as one HTML page, `report.html` in the same folder. Returns its path.

    Args:
        against: the method to compare with, as in `compare`. None is `"dynamic"` if the folder has rows of it;
            otherwise the page has no comparison.

    Raises:
        ValueError: the folder contains no results, or no row has the method `against`.
        ImportError: matplotlib, scipy or math-verify is missing.
    """
    rows, settings = read_results(folder), read_settings(folder)
    if against is None and any(row.method == DYNAMIC for row in rows):
        against = DYNAMIC
    summaries = summarize(rows)
    title = plots.title_of(settings) or folder.resolve().name
    parts = [_figures(summaries, title), _table("Results", table_of(summaries))]
    if against is not None and (comparisons := compare(rows, against)):
        parts.append(_table(f"Compared with {against}, pair by pair", compared_table(comparisons)))
    parts.append(_settings(settings))
    said = [plots.counts_of(summaries), versions(settings, rows)]
    path = folder / NAME
    path.write_text(_page(title, said, "".join(parts)), encoding="ascii")
    return path


def _page(title: str, said: list[str], body: str) -> str:
    """The whole page: a title, a paragraph for each text, and a body in HTML."""
    ours = files(__package__) / "report_page"
    style, script = ((ours / name).read_text(encoding="ascii") for name in ("style.css", "sort.js"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{plain(title)}</title>
<style>
{style}</style>
</head>
<body>
<h1>{plain(title)}</h1>
{"".join(f"<p>{plain(text)}</p>" for text in said)}
{body}
<script>
{script}</script>
</body>
</html>
"""


def _table(title: str, table: Table) -> str:
    heads = "".join(f'<th scope="col"><button>{plain(name)}</button></th>' for name in table.header)
    lines = ["".join(map(_cell, table.header, line)) for line in table.lines]
    rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
    note = f"<p>{plain(table.note)}</p>" * bool(table.note)
    meanings = {name: MEANING[_column(name)] for name in table.header}
    return f"""<h2>{plain(title)}</h2>
<p>Click the head of a column to sort by it.</p>
<div class="scroll"><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody></table></div>
{note}{_folded("What the columns mean", meanings)}
"""


def _cell(name: str, cell: Cell) -> str:
    """One cell. A browser sorts by its value if it has one, and shows the name of its column on a phone."""
    value = cell.value
    number = "" if value is None else f' data-value="{"Infinity" if value == math.inf else value}"'
    return f'<td data-name="{plain(name)}"{number}>{plain(cell.text)}</td>'


def _column(name: str) -> str:
    """The name of a column as `MEANING` has it: `pass@8` is `pass@k`."""
    name = name.partition(" (")[0]
    return name if name in MEANING else re.sub(r"@\d+$", "@k", name)


def _figures(summaries: list[Summary], title: str) -> str:
    wide, narrow = (plots.figures(summaries, title, shape) for shape in (plots.WIDE, plots.NARROW))
    drawn = "".join(_figure(name, figure, narrow[name]) for name, figure in wide.items())
    return f'<h2>Figures</h2>\n<div class="figures">\n{drawn}</div>\n'


def _figure(name: str, wide: Figure, narrow: Figure) -> str:
    """A figure, and its narrow form for windows in which the text of the wide form would be too small."""
    panels = ' class="panels"' * (len(wide.axes) > 1)
    up_to = max(WIDTH, round(SMALLEST * wide.get_figwidth()))
    return (
        f'<figure{panels}><picture><source media="(max-width: {up_to}px)" srcset="{_svg(narrow)}">'
        f'<img alt="figure: {name.replace("_", " ")}" src="{_svg(wide)}"></picture></figure>\n'
    )


def _svg(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(reporting.image(figure, "svg")).decode()


def _settings(settings: Mapping[str, Any]) -> str:
    """Everything that the rows depend on, from the settings of the folder."""
    shown = {name: str(value) for name, value in settings.items() if value not in (None, {})}
    return "<h2>Settings</h2>\n" + _folded("What the rows depend on", shown) if shown else ""


def _folded(title: str, entries: Mapping[str, str]) -> str:
    """Names with a text each, which a click on the title shows."""
    pairs = "".join(f"<dt>{plain(name)}</dt><dd>{plain(text)}</dd>\n" for name, text in entries.items())
    return f"<details><summary>{plain(title)}</summary><dl>\n{pairs}</dl></details>"
