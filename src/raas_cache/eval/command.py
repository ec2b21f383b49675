"""The `eval` command, which also runs as `accelerate launch -m raas_cache.eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..common import arguments
from ..models.load import ALIAS
from .decoding import COLDEST, Decoding
from .model_options import AUTO, Base, DeviceMap, ModelName, Quantize, dtype_of, load
from .results import summarize, table
from .runner import processes, run
from .settings import parse_methods, settings
from .tasks import load_task


MOST_ROWS = 1_000_000
"""Largest `--limit`: generating more chain problems takes hours."""


def evaluate(
    model: ModelName = ALIAS,
    dataset: Annotated[
        str,
        typer.Option(
            help="gsm8k, math500, aime24, aime25, org/name on the Hub, a .jsonl file, chains, or chains-N (N lines)."
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
    base: Base = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (the checkpoint's).")] = AUTO,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=arguments.LARGEST_SEED, help="Seed of sampling and of the chain problems."),
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for rows; an interrupted run continues there.", show_default="results/MODEL-DATASET"),
    ] = None,
) -> None:
    """Measure accuracy, chain length and memory of every method at every budget.

    Each row is written to disk when it ends. If the run is interrupted, the same command continues it.
    """
    budgets = arguments.numbers("--budget", budget)
    with arguments.refusing("--method", budget="--budget"):
        wanted = settings(parse_methods(method, page_size=page_size), budgets)
    with arguments.refusing(temperature="--temperature", top_p="--top-p"):
        state, decoding = processes(), Decoding(max_new_tokens, temperature, top_p, seed)
    with arguments.refusing("--dataset"):
        task = load_task(dataset, limit, seed)
    precision = dtype_of(dtype)
    if out is None:
        out = Path("results") / f"{Path(model).name}-{Path(dataset).stem}"
    with arguments.folder("--out", out), arguments.plain_warnings():
        network, tokenizer = load(model, precision, base=base, device_map=device_map, quantize=quantize)
        # Other errors are about the model: its tokenizer lacks words of the task, or no cache can serve the model.
        with arguments.refusing("--model", out="--out", folder="--out"):
            rows = run(
                network,
                tokenizer,
                task,
                wanted,
                out=out,
                batch_size=batch_size,
                decoding=decoding,
                about={"model": model},
            )
    if state.is_main_process:
        print(f"{len(task.questions)} problems from {dataset}, {model}, {network.dtype}; rows in {out}\n")
        print(table(summarize(rows)))
    state.destroy_process_group()
