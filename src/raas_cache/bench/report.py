"""Tables, JSON files and plots of the measurements."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..common.measure import device_name
from ..common.reporting import STYLES, markdown, require_matplotlib, save
from .kernels import KernelRow
from .steps import BASELINES, Case, StepRow, Timing


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def about(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The device and the versions of its software."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(rows: list[StepRow]) -> str:
    """A Markdown table with one line per row: time of a step, ratios to the baselines, and bytes."""
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


def write_json(path: Path, about: dict[str, Any], rows: Sequence[StepRow | KernelRow]) -> None:
    """Write rows of either kind, including every measured time.

    Args:
        about: values that the measurements depend on, such as the result of `about` and the grid.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Replace the file at once: a run that is killed in between leaves the old file or the new file.
    whole = path.with_name(f"{path.name}.new")
    whole.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    whole.replace(path)


def read_json(path: Path) -> list[StepRow]:
    """Read the rows of a `bench.json`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or has another format. The message names the file, and the row if there is one.
    """
    place = ""
    try:
        found = json.loads(path.read_bytes())
        _check(isinstance(found, dict) and isinstance(found.get("rows"), list), "it has no list of rows")
        rows = []
        for index, row in enumerate(found["rows"]):
            place = f"row {index}: "
            rows.append(_row(row))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is not a file that bench wrote ({place}{type(error).__name__}: {error}): run bench --out "
            "again, or delete it."
        ) from None
    return rows


def _row(found: Any) -> StepRow:
    case, timing = Case(**found["case"]), None if found["timing"] is None else Timing(**found["timing"])
    row = StepRow(case, found["ran"], found["kv_bytes"], timing, found["ratios"])
    _check(all(isinstance(text, str) for text in (case.method, case.mode, row.ran)), "a name is not a string")
    counts = case.batch, case.budget, case.seen, row.kv_bytes
    _check(all(type(count) is int and count > 0 for count in counts), "a count is not a positive integer")
    if timing:
        _check(isinstance(timing.steps, list), "steps is not a list")
        times = timing.median, timing.p10, timing.p90, *timing.steps
        _check(
            all(type(time) in (int, float) and 0 < time < math.inf for time in times), "a time is not a positive number"
        )
    ratios = row.ratios.values() if isinstance(row.ratios, dict) else ["none"]
    _check(all(ratio is None or type(ratio) in (int, float) for ratio in ratios), "a ratio is not a number")
    return row


def _check(holds: bool, wrong: str) -> None:
    if not holds:
        raise ValueError(wrong)


def figures(rows: list[StepRow]) -> dict[str, "Figure"]:
    """Draw `ms_per_token` and `kv_bytes` against the tokens seen: a panel per batch, budget and mode, one line each.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    panels = list(dict.fromkeys((row.case.batch, row.case.budget, row.case.mode) for row in rows))
    styles = dict(zip(dict.fromkeys(row.case.method for row in rows), STYLES * len(rows), strict=False))
    drawn = {}
    for name, unit in (("ms_per_token", "ms per step (one token for each row)"), ("kv_bytes", "K and V held")):
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


def plot(rows: list[StepRow], folder: Path) -> list[Path]:
    """Save the `figures` as PNG and SVG files. Returns their paths. Raises the same errors as `figures`."""
    return save(figures(rows), folder)
