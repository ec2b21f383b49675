"""The `eval` command, which also runs as `accelerate launch -m raas_cache.eval`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ..common import arguments
from ..models.load import ALIAS
from .decoding import COLDEST, Decoding
from .folder import read_settings
from .model_options import AUTO, Base, DeviceMap, ModelName, Quantize, dtype_of, load
from .presets import PRESETS, in_words, use_preset
from .results import summarize, table, versions
from .runner import processes, run
from .settings import parse_methods, settings
from .tasks import HUB_SETS, load_task


MOST_ROWS = 1_000_000
"""Largest `--limit`: generating more chain problems takes hours."""


def evaluate(
    model: ModelName = ALIAS,
    dataset: Annotated[
        str,
        typer.Option(
            help=f"Data sets, separated by commas: {', '.join(HUB_SETS)}; NAME=FILE for the same task from a local "
            "file; org/name on the Hub; a .jsonl file; chains, or chains-N (N lines)."
        ),
    ] = "chains",
    method: Annotated[
        str,
        typer.Option(
            help="Methods, separated by commas, with options after colons: raas:alpha=1e-4:page_size=8. dynamic is "
            "transformers' DynamicCache, which holds everything."
        ),
    ] = "dynamic,raas,quest,h2o,streaming_llm",
    budget: Annotated[
        str, typer.Option(help="Tokens that the cache holds per row, prompt included, separated by commas.")
    ] = "128,256,512,1024",
    page_size: Annotated[
        int, typer.Option(min=1, callback=arguments.power_of_two, help="Tokens per page, a power of two.")
    ] = 16,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST_ROWS, help="Number of problems.", show_default="all; 100 chains")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=arguments.LARGEST, help="Limit of generated tokens per row.", show_default="from the data set"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Largest number of rows in a batch.")] = 8,
    temperature: Annotated[float, typer.Option(help=f"0 for greedy decoding, otherwise {COLDEST} or more.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens with this total probability.")] = 1.0,
    top_k: Annotated[
        int,
        typer.Option(
            min=0, max=arguments.LARGEST, help="Sample from this number of most likely tokens; 0 for all tokens."
        ),
    ] = 0,
    samples: Annotated[
        int, typer.Option(min=1, max=arguments.LARGEST, help="Samples of each problem, for pass@k and maj@k.")
    ] = 1,
    base: Base = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (the checkpoint's).")] = AUTO,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=arguments.LARGEST_SEED, help="Seed of sampling and of the chain problems."),
    ] = 0,
    preset: Annotated[
        str | None,
        typer.Option(
            help="; ".join(f"{name}: {in_words(name)}" for name in PRESETS) + ". Other options win over the preset.",
            callback=use_preset,
            is_eager=True,
        ),
    ] = None,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code",
            help="DANGER: livecodebench runs the programs that the model writes, on this machine and as this user, "
            "with limits of time and memory but without a sandbox.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for rows; an interrupted run continues there. Several data sets have folders inside.",
            show_default="results/MODEL-DATASET",
        ),
    ] = None,
) -> None:
    """Measure accuracy, chain length and memory of every method at every budget.

    `raas-cache compare FOLDER` compares the methods pair by pair, `raas-cache plot FOLDER` draws them, and `raas-cache
    report FOLDER` writes one HTML page. Each row is written to disk when it ends. If the run is interrupted, the same
    command continues it.
    """
    budgets = arguments.numbers("--budget", budget)
    with arguments.refusing("--method", budget="--budget"):
        wanted = settings(parse_methods(method, page_size=page_size), budgets)
    with arguments.refusing(temperature="--temperature", top_p="--top-p", samples="--samples"):
        state, decoding = processes(), Decoding(max_new_tokens, temperature, top_p, seed, top_k, samples)
    with arguments.refusing("--dataset"), arguments.plain_warnings():
        tasks = {name: load_task(name, limit, seed, run_code=run_code) for name in arguments.names(dataset)}
    precision = dtype_of(dtype)
    folders = {name: _folder(out, model, name, len(tasks)) for name in tasks}
    with ExitStack() as stack:
        for folder in folders.values():
            stack.enter_context(arguments.folder("--out", folder))
        stack.enter_context(arguments.plain_warnings())
        network, tokenizer = load(model, precision, base=base, device_map=device_map, quantize=quantize)
        # Other errors are about the model: its tokenizer lacks words of the task, or no cache can serve the model.
        for name, task in tasks.items():
            with arguments.refusing("--model", out="--out", folder="--out"):
                rows = run(
                    network,
                    tokenizer,
                    task,
                    wanted,
                    out=folders[name],
                    batch_size=batch_size,
                    decoding=decoding,
                    about={"model": model},
                )
            if state.is_main_process:
                print(f"{len(task.questions)} problems from {name}, {model}, {network.dtype}; rows in {folders[name]}")
                print(f"{versions(read_settings(folders[name]), rows)}\n\n{table(summarize(rows))}\n")
    state.destroy_process_group()


def _folder(out: Path | None, model: str, dataset: str, count: int) -> Path:
    """The folder for the rows of one of `count` data sets."""
    name = Path(dataset.partition("=")[0]).stem
    if out is None:
        return Path("results") / f"{Path(model).name}-{name}"
    return out if count == 1 else out / name
