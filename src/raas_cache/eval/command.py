"""The `eval` command, which also runs as `accelerate launch -m raas_cache.eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from .. import embedded_model
from ..common import arguments
from .decoding import COLDEST, Decoding
from .folder import read_settings
from .results import summarize, table, versions
from .runner import processes, run
from .settings import parse_methods, settings
from .tasks import load_task


EMBEDDED = "embedded"
MOST_ROWS = 1_000_000
"""Largest `--limit`: generating more chain problems takes hours."""


def evaluate(
    model: Annotated[
        str, typer.Option(help="A folder, a name on the Hub, or `embedded`, the small model in this package.")
    ] = EMBEDDED,
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
    top_k: Annotated[
        int,
        typer.Option(
            min=0, max=arguments.LARGEST, help="Sample from this number of most likely tokens; 0 for all tokens."
        ),
    ] = 0,
    samples: Annotated[
        int, typer.Option(min=1, max=arguments.LARGEST, help="Samples of each problem, for pass@k and maj@k.")
    ] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (the checkpoint's).")] = "auto",
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

    `raas-cache compare FOLDER` compares the methods pair by pair, and `raas-cache plot FOLDER` draws them. Each row is
    written to disk when it ends. If the run is interrupted, the same command continues it.
    """
    budgets = arguments.numbers("--budget", budget)
    with arguments.refusing("--method", budget="--budget"):
        wanted = settings(parse_methods(method, page_size=page_size), budgets)
    with arguments.refusing(temperature="--temperature", top_p="--top-p", samples="--samples"):
        state, decoding = processes(), Decoding(max_new_tokens, temperature, top_p, seed, top_k, samples)
    with arguments.refusing("--dataset"):
        task = load_task(dataset, limit, seed)
    torch_dtype = dtype if dtype == "auto" else arguments.dtype(dtype)
    if out is None:
        out = Path("results") / f"{Path(model).name}-{Path(dataset).stem}"
    with arguments.folder("--out", out), arguments.plain_warnings():
        tokenizer, network = load(model, torch_dtype)
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
        print(f"{len(task.questions)} problems from {dataset}, {model}, {network.dtype}; rows in {out}")
        print(f"{versions(read_settings(out), rows)}\n")
        print(table(summarize(rows)))
    state.destroy_process_group()


def load(name: str, dtype: torch.dtype | str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load the tokenizer and the model, and move the model to the device of this process."""
    disable_progress_bar()
    path = name
    if name == EMBEDDED:
        path = embedded_model()
        torch.set_num_threads(1)  # the model is too small for several cores
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except Exception as error:  # the Hub client, the config and the weights raise many kinds of errors
        reason = str(error).strip().partition("\n")[0]
        raise typer.BadParameter(
            f"{name!r} cannot be loaded ({type(error).__name__}: {reason}): give a folder with config.json, weights "
            "and tokenizer, or a name on the Hub.",
            param_hint="--model",
        ) from None
    return tokenizer, model.eval().to(processes().device)
