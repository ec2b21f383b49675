"""Tables, JSON and plots of what was timed."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..reporting import markdown
from .steps import BASELINES, Case, Row, Timing


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart; markers for those who print.
STYLES = (
    ("#000000", "o"), ("#999999", "s"), ("#E69F00", "D"), ("#0072B2", "^"), ("#D55E00", "v"), ("#009E73", "P"),
    ("#CC79A7", "X"), ("#56B4E9", "*"), ("#F0E442", "h"),
)  # fmt: skip


def about(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The machine and its software."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(rows: list[Row]) -> str:
    """A line a row: time of a step, its ratios to the baselines, and bytes."""
    header = ["method", "batch", "budget", "seen", "mode", "ran", "ms/token (p10 to p90)"]
    header += [f"/ {base}" for base in BASELINES] + ["KV bytes"]
    lines = []
    for row in rows:
        case, timing = row.case, row.timing
        cells = [case.method, str(case.batch), f"{case.budget:,}", f"{case.seen:,}", case.mode, row.ran]
        cells.append(f"{timing.median:.2f} ({timing.p10:.2f} to {timing.p90:.2f})" if timing else "-")
        cells += ["-" if ratio is None else f"{ratio:.2f}" for ratio in row.ratios.values()]
        lines.append([*cells, f"{row.kv_bytes:,}"])
    return markdown(header, lines)


def write_json(path: Path, of: dict[str, Any], rows: list) -> None:
    """Write rows of either kind, every time measured included.

    Args:
        of: what the numbers depend on, such as `about` and the plan.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**of, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def read_json(path: Path) -> list[Row]:
    """The rows of a `bench.json`."""
    return [
        Row(Case(**row["case"]), row["ran"], row["kv_bytes"], row["timing"] and Timing(**row["timing"]), row["ratios"])
        for row in json.loads(path.read_text())["rows"]
    ]


def require_matplotlib() -> None:
    """Raise an ImportError that says what to install if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("Plots need matplotlib: pip install raas-cache[viz]")


def figures(rows: list[Row]) -> dict[str, "Figure"]:
    """`ms_per_token` and `kv_bytes` against the tokens seen: a panel for each batch, budget and mode, a line a method.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    panels = list(dict.fromkeys((row.case.batch, row.case.budget, row.case.mode) for row in rows))
    styles = dict(zip(dict.fromkeys(row.case.method for row in rows), STYLES * len(rows), strict=False))
    drawn = {}
    for name, unit in (("ms_per_token", "ms/token (a step of the batch)"), ("kv_bytes", "K and V held")):
        figure = Figure(figsize=(1.5 + 4.5 * len(panels), 4.2), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            batch, budget, mode = panel
            here = [row for row in rows if row.timing and (row.case.batch, row.case.budget, row.case.mode) == panel]
            for method, (colour, marker) in styles.items():
                points = sorted((row.case.seen, row) for row in here if row.case.method == method)
                ys = [row.timing.median if name == "ms_per_token" else row.kv_bytes for _, row in points]
                axis.plot([seen for seen, _ in points], ys, color=colour, marker=marker, label=method)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            ticks = sorted({row.case.seen for row in here})
            axis.set_xticks(ticks, [f"{seen // 1024}k" if seen % 1024 == 0 else str(seen) for seen in ticks])
            axis.set(title=f"batch {batch}, budget {budget:,}, {mode}", xlabel="tokens seen")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel(unit)
        axes[0].yaxis.set_major_formatter(EngFormatter("" if name == "ms_per_token" else "B"))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
        drawn[name] = figure
    return drawn


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Save `figures` as PNG and SVG; returns where. Raises as `figures` does."""
    return save(figures(rows), folder)


def save(drawn: dict[str, "Figure"], folder: Path) -> list[Path]:
    """Save each figure as PNG and SVG under its name; returns where. The same figure gives the same bytes."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with rc_context({"svg.hashsalt": "raas-cache"}):
        for name, figure in drawn.items():
            for kind, metadata in (("png", None), ("svg", {"Date": None})):
                paths.append(folder / f"{name}.{kind}")
                figure.savefig(paths[-1], dpi=150, metadata=metadata)
    return paths
