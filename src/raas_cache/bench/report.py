"""Tables, JSON and plots of what was timed."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..common.reporting import STYLES, markdown, require_matplotlib, save
from .kernels import KernelRow
from .steps import BASELINES, Case, Row, Timing


if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def write_json(path: Path, of: dict[str, Any], rows: Sequence[Row | KernelRow]) -> None:
    """Write rows of either kind, every time measured included.

    Args:
        of: what the numbers depend on, such as `about` and the plan.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In one piece: a run that is cut off meanwhile leaves the old file or the new one.
    whole = path.with_name(f"{path.name}.new")
    whole.write_text(json.dumps({**of, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    whole.replace(path)


def read_json(path: Path) -> list[Row]:
    """The rows of a `bench.json`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or is something else; names the file, and the row if there is one.
    """
    place = ""
    try:
        found = json.loads(path.read_bytes())
        _check(isinstance(found, dict) and isinstance(found.get("rows"), list), "it has no list of rows")
        rows = []
        for index, of in enumerate(found["rows"]):
            place = f"row {index}: "
            rows.append(_row(of))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is not what bench writes ({place}{type(error).__name__}: {error}): run bench --out again, "
            "or delete it."
        ) from None
    return rows


def _row(of: Any) -> Row:
    case, timing = Case(**of["case"]), None if of["timing"] is None else Timing(**of["timing"])
    row = Row(case, of["ran"], of["kv_bytes"], timing, of["ratios"])
    _check(all(isinstance(text, str) for text in (case.method, case.mode, row.ran)), "a name is no text")
    counts = case.batch, case.budget, case.seen, row.kv_bytes
    _check(all(type(count) is int and count > 0 for count in counts), "a count is no positive number")
    if timing:
        _check(isinstance(timing.steps, list), "steps is no list")
        times = timing.median, timing.p10, timing.p90, *timing.steps
        _check(
            all(type(time) in (int, float) and 0 < time < math.inf for time in times), "a time is no positive number"
        )
    ratios = row.ratios.values() if isinstance(row.ratios, dict) else ["none"]
    _check(all(ratio is None or type(ratio) in (int, float) for ratio in ratios), "a ratio is no number")
    return row


def _check(holds: bool, wrong: str) -> None:
    if not holds:
        raise ValueError(wrong)


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
            here = [
                (row.case, row.timing.median if name == "ms_per_token" else row.kv_bytes)
                for row in rows
                if row.timing and (row.case.batch, row.case.budget, row.case.mode) == panel
            ]
            for method, (colour, marker) in styles.items():
                points = sorted((case.seen, y) for case, y in here if case.method == method)
                xs, ys = [x for x, _ in points], [y for _, y in points]
                axis.plot(xs, ys, color=colour, marker=marker, label=method)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            ticks = sorted({case.seen for case, _ in here})
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
