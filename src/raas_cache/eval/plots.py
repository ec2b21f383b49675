"""Figures of an evaluation: accuracy and chain length against the budget, and an ablation for each option."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

from ..bench import report
from ..cache.paged_cache import PagedCache
from ..common import reporting
from .folder import read_settings
from .results import Summary, summarize
from .rows import no_results, read_rows
from .settings import DYNAMIC, Setting, common_options


if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: list[dict[str, Any]] = [
    {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 6}
    for dashes, (colour, marker) in product(("-", "--", ":"), reporting.STYLES)
]
HOLLOW: dict[str, Any] = {"markerfacecolor": "white"}
UNITS = {
    "alpha": "attention weight", "top_ratio": "share of the pages", "page_size": "tokens",
    "min_decode_pages": "pages", "recent_ratio": "share of the pages", "dense_layers": "layers",
    "recent_tokens": "tokens", "protected_ratio": "share of the pages",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The shape of all figures.

    Args:
        columns: largest number of panels side by side.
        panel: width and height of a panel, in inches.
        beside: width of what stands beside the panels, in inches.
        legend: where the legend is, in the words of matplotlib.
        characters: largest length of a line of the title, and of a line below an axis.
    """

    columns: int
    panel: tuple[float, float]
    beside: float
    legend: Literal["outside right upper", "outside lower left"]
    characters: int


WIDE = Shape(columns=3, panel=(4.8, 3.8), beside=3, legend="outside right upper", characters=64)
NARROW = Shape(columns=1, panel=(3.6, 3.0), beside=0, legend="outside lower left", characters=34)
"""For a phone: as wide as its screen, so that the text keeps its size."""

Panel = dict[int, dict[Any, Summary]]
"""Settings that differ only in one option and in the budget: budget -> value of the option -> summary."""


def figures(summaries: list[Summary], title: str = "", shape: Shape = WIDE) -> dict[str, Figure]:
    """Draw the summaries. Returns the figures by name; no figures if there are no summaries.

    - `accuracy` and `chain_length` (mean number of generated tokens) against the budget. Each method has a line, and so
      has each method with options that has at least two budgets. The line of `dynamic` is horizontal. Budgets by layer
      are drawn at their mean.
    - `ablation_<option>`: accuracy against the values of an option, with one panel per method and one line per budget.
      It exists if there are settings that differ only in this option. A setting without the option is drawn at the
      default value.

    Options that most settings share are written above the figure instead of in its labels.

    Args:
        title: text above each figure, such as the names of data set and model.
        shape: `WIDE` with the legend beside the panels, or `NARROW` with the legend below.

    Raises:
        ImportError: matplotlib is missing.
    """
    reporting.require_matplotlib()
    if not summaries:
        return {}
    common = common_options(summary.setting for summary in summaries)
    drawn = {"accuracy": _accuracy(summaries, common, shape), "chain_length": _chain_length(summaries, common, shape)}
    for option, panels in _ablations(summaries).items():
        drawn[f"ablation_{option}"] = _ablation(option, panels, common, shape)
    said = [", ".join(filter(None, [title, counts_of(summaries)]))]
    if common:
        said.append("unless said otherwise: " + ", ".join(common))
    for figure in drawn.values():
        # Wrap long lines here: the layout would leave no room for the legend next to a long line.
        figure.suptitle("\n".join(fill(line, shape.characters) for line in said), x=0.01, ha="left", fontsize=10)
    return drawn


def plot(folder: Path) -> list[Path]:
    """Draw the `rows*.jsonl` and the `bench.json` of a folder, and save PNG and SVG files there. Returns their paths.

    Raises:
        ValueError: the folder contains neither.
        ImportError: matplotlib is missing.
    """
    bench = folder / "bench.json"
    drawn = figures(summarize(read_rows(folder)), title_of(read_settings(folder)))
    if bench.exists():
        drawn |= report.figures(report.read_json(bench))
    if not drawn:
        raise no_results(folder)
    return reporting.save(drawn, folder)


def title_of(settings: Mapping[str, Any]) -> str:
    """The names of data set and model, as far as the settings of a folder have them."""
    return ", ".join(Path(str(settings[name])).name for name in ("task", "model") if name in settings)


def counts_of(summaries: list[Summary]) -> str:
    """How many problems the summaries have, and how many samples of each if there are several."""
    problems = _range(summary.problems for summary in summaries) + " problems"
    several = any(summary.samples > 1 for summary in summaries)
    return problems + f", {_range(summary.samples for summary in summaries)} samples each" * several


def _range(counts: Iterable[int]) -> str:
    """The smallest and the largest count; one number if they are equal."""
    ordered = sorted(counts)
    return " to ".join(f"{count:,}" for count in dict.fromkeys((ordered[0], ordered[-1])))


def _bounded(summaries: list[Summary]) -> list[Summary]:
    return [summary for summary in summaries if summary.setting.method != DYNAMIC]


def _tokens(setting: Setting) -> float:
    """The position of the setting's budget on an axis."""
    return fmean(setting.budget) if isinstance(setting.budget, tuple) else setting.budget or 0


def _lines(summaries: list[Summary], common: list[str]) -> dict[str, list[Summary]]:
    """Label -> summaries by budget, `dynamic` first. Settings with options and a single budget are left out."""
    lines: dict[str, list[Summary]] = {}
    for summary in sorted(summaries, key=lambda summary: summary.setting.method != DYNAMIC):
        lines.setdefault(summary.setting.label_but(common), []).append(summary)
    drawn = {label: group for label, group in lines.items() if len(group) > 1 or ":" not in label}
    drawn = drawn if drawn.keys() - {DYNAMIC} else lines  # keep all lines if the figure would be empty
    return {label: sorted(group, key=lambda summary: _tokens(summary.setting)) for label, group in drawn.items()}


def _ablations(summaries: list[Summary]) -> dict[str, list[Panel]]:
    """Option -> one panel for each group of settings that differ only in this option and in the budget."""
    values = [
        (summary, summary.setting.budget, _in_effect(summary.setting))
        for summary in _bounded(summaries)
        if isinstance(summary.setting.budget, int)
    ]
    found = {}
    for option in dict.fromkeys(name for summary, _, _ in values for name in summary.setting.options):
        alike: dict[tuple[str, str], Panel] = {}
        for summary, budget, options in values:
            if option in options:
                others = repr(sorted((name, value) for name, value in options.items() if name != option))
                panel = alike.setdefault((summary.setting.method, others), {})
                panel.setdefault(budget, {}).setdefault(options[option], summary)
        panels = [{budget: points for budget, points in panel.items() if len(points) > 1} for panel in alike.values()]
        if any(panels):
            found[option] = [panel for panel in panels if panel]
    return found


def _in_effect(setting: Setting) -> dict[str, Any]:
    """All options of the setting's cache, including defaults."""
    found = dict(setting.options)
    try:
        cache = setting.new_cache()
    except (ValueError, TypeError):
        return found  # an unregistered method, or an option that needs a GPU: only the given options are known
    if isinstance(cache, PagedCache):
        found |= vars(cache.settings) | vars(cache.settings.policy)
    return {name: value for name, value in found.items() if name not in ("policy", "budget")}


def _accuracy(summaries: list[Summary], common: list[str], shape: Shape) -> Figure:
    figure, (axis,) = _figure(1, shape)
    lines = _lines(summaries, common)
    for (label, group), style, aside in zip(lines.items(), cycle(STYLES), _asides(len(lines)), strict=False):
        if label == DYNAMIC:
            axis.axhspan(*group[0].interval, color=style["color"], alpha=0.1, linewidth=0)
            _level(axis, group[0].accuracy, style)
        else:
            _with_intervals(axis, [_tokens(summary.setting) for summary in group], group, aside, label=label, **style)
    _budgets_below(axis, summaries, shape)
    _accuracy_beside([axis])
    _legend(figure, shape)
    return figure


def _chain_length(summaries: list[Summary], common: list[str], shape: Shape) -> Figure:
    figure, (axis,) = _figure(1, shape)
    for (label, group), style in zip(_lines(summaries, common).items(), cycle(STYLES), strict=False):
        cut = [summary for summary in group if 2 * summary.truncated > summary.rows]
        if label == DYNAMIC:
            _level(axis, group[0].mean_tokens, {**style, **(HOLLOW if cut else {})})
            continue
        for some, look in ((group, {**style, "label": label}), (cut, {**style, **HOLLOW, "linestyle": "none"})):
            axis.plot([_tokens(summary.setting) for summary in some], [summary.mean_tokens for summary in some], **look)
    if any(2 * summary.truncated > summary.rows for summary in summaries):
        look = {"color": "0.4", "marker": "o", "linestyle": "none", **HOLLOW}
        axis.plot([], [], label="hollow: most rows\nwere cut off", **look)
    _budgets_below(axis, summaries, shape)
    axis.set_ylabel("generated tokens per problem, mean")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    _legend(figure, shape)
    return figure


def _ablation(option: str, panels: list[Panel], common: list[str], shape: Shape) -> Figure:
    values = list(dict.fromkeys(value for panel in panels for points in panel.values() for value in points))
    are_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    at = {value: value if are_numbers else place for place, value in enumerate(values)}
    budgets = sorted({budget for panel in panels for budget in panel})
    figure, axes = _figure(len(panels), shape)
    for axis, panel in zip(axes, panels, strict=True):
        for budget, style, aside in zip(budgets, cycle(STYLES), _asides(len(budgets)), strict=False):
            if budget in panel:
                xs, group = zip(*sorted((at[value], summary) for value, summary in panel[budget].items()), strict=True)
                look = style if are_numbers else {**style, "linestyle": "none"}
                _with_intervals(axis, xs, group, aside, label=f"{budget:,}", **look)
        axis.set_title(group[0].setting.label_but(common, option), fontsize=10)
        axis.set_xlabel(fill(f"{option} ({UNITS[option]})" if option in UNITS else option, shape.characters))
        _ticks_below(axis, {x: f"{value:g}" if are_numbers else str(value) for value, x in at.items()}, wide=20)
        if not are_numbers:
            axis.set_xlim(-0.5, len(values) - 0.5)
    _accuracy_beside(axes)
    _legend(figure, shape, "budget, tokens")
    return figure


def _figure(panels: int, shape: Shape) -> tuple[Figure, list[Axes]]:
    """A figure with panels of equal size."""
    from matplotlib.figure import Figure

    columns = min(panels, shape.columns)
    rows = -(-panels // columns)
    width, height = shape.panel
    figure = Figure(figsize=(shape.beside + width * columns, 0.8 + height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    for axis in axes[:panels]:
        axis.grid(alpha=0.3)
    return figure, axes[:panels]


def _asides(count: int) -> list[float]:
    """Horizontal offset in points of each of `count` lines, so that their bars do not hide each other."""
    step = min(4.0, 24 / count)
    return [step * (number - (count - 1) / 2) for number in range(count)]


def _level(axis: Axes, height: float, style: dict[str, Any]) -> None:
    """Draw the horizontal line of `dynamic`, with markers at its ends."""
    axis.axhline(height, label=DYNAMIC, clip_on=False, zorder=1.5, **style)


def _with_intervals(axis: Axes, xs: Sequence[float], group: Sequence[Summary], aside: float, **style: Any) -> None:
    from matplotlib.transforms import offset_copy

    (line,) = axis.plot(xs, [summary.accuracy for summary in group], **style)
    lows, highs = zip(*(summary.interval for summary in group), strict=True)
    bars = axis.vlines(xs, lows, highs, color=style["color"], linewidth=1)
    # Shift the lines last, because the axis is scaled to the data.
    for artist in (line, bars):
        moved = offset_copy(axis.transData, axis.figure, x=aside, units="points")  # type: ignore[arg-type]
        artist.set_transform(moved)


def _budgets_below(axis: Axes, summaries: list[Summary], shape: Shape) -> None:
    budgets = sorted({_tokens(summary.setting) for summary in _bounded(summaries)})
    _ticks_below(axis, {budget: f"{budget:,.0f}" for budget in budgets}, wide=4)
    axis.set_xlabel(fill("budget (tokens for each row, layer and KV head)", shape.characters))


def _ticks_below(axis: Axes, ticks: dict[float, str], wide: float) -> None:
    """One tick per value. The axis is logarithmic if the largest value exceeds `wide` times the smallest above 0."""
    least = min((value for value in ticks if value > 0), default=0)
    if max(ticks, default=0) > wide * least:
        axis.set_xscale("symlog", base=2, linthresh=least) if min(ticks) < least else axis.set_xscale("log", base=2)
    axis.set_xticks(list(ticks), list(ticks.values()), rotation=60 if len(ticks) > 6 else 0)
    axis.minorticks_off()


def _accuracy_beside(axes: list[Axes]) -> None:
    from matplotlib.ticker import PercentFormatter

    for axis in axes:
        axis.tick_params(labelleft=True)
    for axis in axes[:: axes[0].get_gridspec().ncols]:  # type: ignore[union-attr]
        axis.set_ylabel("accuracy (bars: 95 % intervals)")
    axes[0].set_ylim(bottom=0)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))


def _legend(figure: Figure, shape: Shape, title: str = "") -> None:
    """Draw a legend beside or below the panels. Each label appears once."""
    entries: dict[str, Artist] = {}
    for axis in figure.axes:
        entries |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if shape.beside:
        figure.set_figheight(max(figure.get_figheight(), 1 + 0.2 * len(entries)))
    else:
        figure.set_figheight(figure.get_figheight() + 0.2 * len(entries))
    figure.legend(entries.values(), entries, loc=shape.legend, title=title, fontsize=9)
