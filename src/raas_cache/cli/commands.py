"""The command line. `raas-cache demo` shows a model with a bounded cache, `eval` measures accuracy, `compare` compares
methods pair by pair, `report` writes the results as one HTML page, `fidelity` measures what a cache changes on a given
text, `probe` measures what a model recalls, `shares` learns a share of the budget for each KV head, `plan` computes the
memory of a budget, `serve` serves a model with OpenAI's API, `bench` times decode steps, and `plot` draws the
results."""

import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench import kernels as kernel_bench
from ..bench import report
from ..bench.filling import build_model, load_config, read_config
from ..bench.peer import Peer
from ..bench.steps import Grid, StepRow, run
from ..common import arguments
from ..common.reporting import require_matplotlib
from ..eval import plots
from ..eval.command import evaluate
from ..eval.comparison import compare as paired
from ..eval.comparison import compared
from ..eval.html_report import write_report
from ..eval.rows import read_results
from ..eval.settings import DYNAMIC
from ..fidelity.command import fidelity
from ..probes.command import probe
from ..sizing import plan as planning
from .demo import demo
from .serve import serve
from .shares import shares


PAGE_SIZE = typer.Option(
    min=1, max=arguments.LARGEST, callback=arguments.power_of_two, help="Tokens per page, a power of two."
)
MOST_STEPS = 1_000_000

app: typer.Typer = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)
app.command()(demo)
app.command("eval")(evaluate)
app.command()(fidelity)
app.command()(probe)
app.command()(shares)
app.command()(serve)


@app.callback()
def main() -> None:
    """The KV cache that lets a reasoning model think for 100,000 tokens in the memory of 1,000."""


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Option(
            help="small, llama-3-8b, a folder with a config.json, or a name on the Hub. Only the config is read."
        ),
    ],
    budget: Annotated[
        str | None, typer.Option(help="Budgets in tokens, separated by commas.", show_default="1024,2048,4096")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="Instead of --budget: find the largest budget for this many GB (1e9 bytes).")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1",
    prompt: Annotated[
        int, typer.Option(max=arguments.LARGEST, help="Prompt length in tokens.")
    ] = planning.DEFAULT_PROMPT,
    tokens: Annotated[
        int,
        typer.Option(max=arguments.LARGEST, help="Length of prompt and chain together, for the size of DynamicCache."),
    ] = planning.DEFAULT_TOKENS,
    page_size: Annotated[int, PAGE_SIZE] = 16,
    dtype: Annotated[
        str | None, typer.Option(help="dtype of the model.", show_default="from the config, otherwise bfloat16")
    ] = None,
) -> None:
    """Compute from a model's config how much memory a budget needs and saves."""
    if budget is not None and memory is not None:
        raise typer.BadParameter("leave it out: --memory finds the budget.", param_hint="--budget")
    if memory is not None and not 0 < memory <= arguments.LARGEST:
        raise typer.BadParameter(f"{memory} must be above 0 and at most {arguments.LARGEST} GB.", param_hint="--memory")
    with arguments.refusing("--model"):
        config = read_config(model)
    with arguments.refusing(
        config="--model", budget="--budget", nbytes="--memory", batch_size="--batch", prompt_tokens="--prompt",
        tokens="--tokens",
    ):  # fmt: skip
        text = planning.table(
            config,
            batches=arguments.numbers("--batch", batch),
            budgets=()
            if memory is not None
            else arguments.numbers("--budget", "1024,2048,4096" if budget is None else budget),
            memory=round((memory or 0) * 1e9),
            prompt_tokens=prompt,
            tokens=tokens,
            page_size=page_size,
            dtype=None if dtype is None else arguments.dtype(dtype),
        )
    print(text)


@app.command()
def bench(
    method: Annotated[
        str, typer.Option(help="Methods, separated by commas, with options after colons: raas:shares=FILE.")
    ] = "raas,quest,h2o,streaming_llm",
    seen: Annotated[str, typer.Option(help="Tokens seen before the first step, separated by commas.")] = ",".join(
        str(1024 << doublings) for doublings in range(8)
    ),
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
    page_size: Annotated[int, PAGE_SIZE] = 16,
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


@app.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="Folder that eval or bench wrote with --out.")],
) -> None:
    """Draw the results of eval and bench as PNG and SVG files in the same folder."""
    with arguments.refusing(), arguments.plain_warnings():
        paths = plots.plot(folder)
    for path in paths:
        print(path)


@app.command()
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


@app.command("report")
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


def _in_words(about: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in about.items())
