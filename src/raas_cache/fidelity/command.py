"""The `fidelity` command, which also runs as `torchrun -m raas_cache.fidelity`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ..common import arguments
from ..eval.model_options import Base, DeviceMap, Dtype, ModelName, Quantize, dtype_of, load
from ..eval.runner import processes
from ..eval.settings import parse_methods, rivals_of, settings
from .measure import measure
from .texts import TRACES, load_texts


# The options that `raas-cache fidelity` has in common with `raas-cache probe` or `raas-cache shares`.
Methods = Annotated[
    str, typer.Option(help="Methods, separated by commas, with options after colons: raas:alpha=0.01:page_size=8.")
]
Budgets = Annotated[
    str, typer.Option(help="Budgets, separated by commas: tokens, or shares of --tokens (25%). The prompt counts.")
]
Against = Annotated[str | None, typer.Option(help="A method from --methods: also compare every method with this one.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Largest number of texts in a batch.")]
Data = Annotated[
    str, typer.Option(help="A JSONL file with problem and reasoning, or traces: twelve real chains of thought.")
]
ChainTokens = Annotated[
    int, typer.Option(min=1, max=arguments.LARGEST, help="Tokens to read of each chain. Shorter ones are left out.")
]
Rows = Annotated[int | None, typer.Option(min=1, help="Number of texts.", show_default="all")]
PageSize = Annotated[int, typer.Option(min=1, callback=arguments.power_of_two, help="Tokens per page, a power of two.")]


def fidelity(
    model: ModelName = "smollm2",
    data: Data = TRACES,
    methods: Methods = "raas,window,random,quest",
    budgets: Budgets = "25%",
    tokens: ChainTokens = 1024,
    rows: Rows = None,
    against: Against = None,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="Print the constructor call of the best bounded cache at each budget.")
    ] = False,
    page_size: PageSize = 16,
    batch_size: BatchSize = 1,
    base: Base = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for rows; an interrupted run continues there.", show_default="prints tables only"),
    ] = None,
) -> None:
    """Measure how much each cache changes what a model predicts, on chains of thought that it reads token by token."""
    with arguments.refusing("--methods", budget="--budgets"):
        wanted = settings(parse_methods(methods, page_size=page_size), budgets_of(budgets, tokens, "--budgets"))
    with arguments.refusing("--against"):
        if against is not None:
            rivals_of(wanted, against)
    with arguments.refusing("--data"):
        texts = load_texts(data, rows)
    with arguments.refusing():
        state = processes()
    precision = dtype_of(dtype)
    with arguments.folder("--out", out), arguments.plain_warnings():
        network, tokenizer = load(model, precision, base=base, device_map=device_map, quantize=quantize)
        with arguments.refusing("--model", out="--out", folder="--out", tokens="--tokens"):
            found = measure(
                network,
                tokenizer,
                texts,
                wanted,
                tokens=tokens,
                batch_size=batch_size,
                out=out,
                about={"model": model, "data": Path(data).name},
            )
    if state.is_main_process:
        print(f"{len(texts) - found.too_short} texts from {data}, {tokens:,} tokens each, {model}, {network.dtype}")
        if found.too_short:
            print(f"{found.too_short} of {len(texts)} texts have shorter chains and are left out.")
        print(f"\n{found.table(against)}\n\nLoss - dynamic by position in the chain:\n\n{found.by_position()}")
        print(f"\nLoss - dynamic by tokens since the last use of the same token:\n\n{found.by_distance()}")
        if recommend:
            print(f"\n{found.recommend()}")
    state.destroy_process_group()


def budgets_of(text: str, tokens: int, option: str) -> list[int]:
    """Parse budgets such as `"12.5%,25%,768"`, shares of `tokens` tokens or numbers of tokens."""
    found = []
    for part in text.split(","):
        number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)(%?)\s*", part)
        if number is None or (not number[2] and "." in number[1]):
            raise typer.BadParameter(
                f"{part.strip()!r} must be a number of tokens, or a share such as 25%.", param_hint=option
            )
        found.append(round(float(number[1]) / 100 * tokens) if number[2] else int(number[1]))
    return found
