"""The `plan` command: the memory of a budget."""

from typing import Annotated

import typer

from ..bench.filling import read_config
from ..common import arguments
from ..sizing import plan as planning


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
    page_size: arguments.PageSize = 16,
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
