"""The `bench` command: the time of decode steps."""

import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench import kernels as kernel_bench
from ..bench import report
from ..bench.filling import build_model, load_config
from ..bench.peer import Peer
from ..bench.steps import Grid, StepRow, run
from ..common import arguments
from ..common.reporting import require_matplotlib


MOST_STEPS = 1_000_000
SEEN = ",".join(str(1024 << doublings) for doublings in range(8))


def bench(
    method: Annotated[
        str, typer.Option(help="Methods, separated by commas, with options after colons: raas:shares=FILE.")
    ] = "raas,quest,h2o,streaming_llm",
    seen: Annotated[str, typer.Option(help="Tokens seen before the first step, separated by commas.")] = SEEN,
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes, separated by commas.", show_default="1; kernels on a GPU: 32")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Budgets in tokens, separated by commas.", show_default="1024; kernels on a GPU: 2048,8192"),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="eager, compiled, or eager,compiled.", show_default="eager; on a GPU both")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="small, llama-3-8b, a folder with a config.json, or a name on the Hub. The weights are random.",
            show_default="small; on a GPU llama-3-8b",
        ),
    ] = None,
    page_size: arguments.PageSize = 16,
    steps: Annotated[
        int, typer.Option(min=2, max=MOST_STEPS, help="Timed steps per method, or timed calls per kernel.")
    ] = 40,
    copies: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Caches per method, which take turns.")] = 2,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda if available")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="dtype of weights, keys and values.", show_default="float32; on a GPU bfloat16")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=arguments.LARGEST_SEED, help="Seed of weights, keys and values.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for JSON and plots.", show_default="prints the table only")
    ] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Time the attention kernel alone.")] = False,
    peer_python: Annotated[
        Path | None,
        typer.Option(help="Python of an environment with kvpress, to time its DecodingPress, too."),
    ] = None,
) -> None:
    """Time decode steps after many tokens, with every method, DynamicCache (dynamic) and StaticCache."""
    place = arguments.device(device)
    on_gpu = place.type == "cuda"
    # A default applies only if the option is missing. An empty value, such as an unset shell variable, is an error.
    if dtype is None:
        dtype = "bfloat16" if on_gpu else "float32"
    if model is None:
        model = "llama-3-8b" if on_gpu else "small"
    if batch is None:
        batch = "32" if kernels and on_gpu else "1"
    if budget is None:
        budget = "2048,8192" if kernels and on_gpu else "1024"
    if mode is None:
        mode = "eager,compiled" if on_gpu else "eager"
    precision, modes = arguments.dtype(dtype), arguments.names(mode)
    batches, budgets = arguments.numbers("--batch", batch), arguments.numbers("--budget", budget)
    with arguments.refusing("--model"):
        config = load_config(model)
    about = {"model": model, **report.about(place, precision)}
    of_options = {name: f"--{name}" for name in ("method", "seen", "batch", "budget", "mode", "steps", "copies")}
    of_options |= {"name": "--method", "repeats": "--steps"}
    with arguments.folder("--out", out), arguments.refusing(**of_options):
        if kernels:
            timed = kernel_bench.run_kernels(
                config,
                batches=batches,
                budgets=budgets,
                page_size=page_size,
                repeats=steps,
                dtype=precision,
                device=place,
                seed=seed,
            )
            print(f"{_in_words(about)}\n{kernel_bench.kernel_table(timed)}")
            if out:
                report.write_json(out / "kernels.json", about, timed)
            return

        tokens = arguments.numbers("--seen", seen)
        with arguments.refusing("--method", **of_options):
            grid = Grid(arguments.names(method), tokens, batches, budgets, modes, page_size, steps, copies, seed)
        if out:
            require_matplotlib()
        print(_in_words(about))
        rows: list[StepRow] = []
        with ExitStack() as stack:
            peer = None if peer_python is None else stack.enter_context(Peer(peer_python))
            if peer is not None:
                about["peer"] = peer.about
                print(f"peer: {_in_words(peer.about)}")
            for cell in run(build_model(config, place, precision, seed), grid, peer):
                rows += cell
                case = cell[0].case
                print(
                    f"timed: batch {case.batch}, budget {case.budget}, seen {case.seen}, {case.mode}", file=sys.stderr
                )
                if out:  # write after every cell, because the run may be interrupted
                    report.write_json(out / "bench.json", {**about, "grid": asdict(grid)}, rows)
        print(report.table(rows))
        if out:
            report.plot(rows, out)


def _in_words(about: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in about.items())
