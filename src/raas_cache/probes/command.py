"""The `probe` command, which also runs as `torchrun -m raas_cache.probes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..common import arguments
from ..eval.model_options import Base, DeviceMap, Dtype, ModelName, Quantize, dtype_of, load
from ..eval.runner import processes
from ..eval.settings import parse_methods, rivals_of, settings
from ..fidelity.command import Against, BatchSize, Budgets, Methods, PageSize, budgets_of
from . import measure
from .stories import PROBES


def probe(
    model: ModelName = "smollm2",
    names: Annotated[
        str, typer.Option("--probe", help=f"Probes, separated by commas: {', '.join(PROBES)}.")
    ] = ",".join(PROBES),
    methods: Methods = "raas,window,random,quest",
    budgets: Budgets = "25%",
    tokens: Annotated[
        int, typer.Option(min=1, max=arguments.LARGEST, help="Tokens of each text, without the prompt.")
    ] = 1024,
    texts: Annotated[int, typer.Option(min=1, help="Number of texts of each probe.")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=arguments.LARGEST_SEED, help="Seed of the texts.")] = 0,
    against: Against = None,
    page_size: PageSize = 16,
    batch_size: BatchSize = 1,
    base: Base = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for rows, with a folder per probe; an interrupted run continues there.",
            show_default="prints tables only",
        ),
    ] = None,
) -> None:
    """Measure how many facts a model recalls with each cache: lemmas of a chain, and needles among distractors."""
    with arguments.refusing("--methods", budget="--budgets"):
        wanted = settings(parse_methods(methods, page_size=page_size), budgets_of(budgets, tokens, "--budgets"))
    with arguments.refusing("--against"):
        if against is not None:
            rivals_of(wanted, against)
    with arguments.refusing("--probe"):
        chosen = arguments.names(names)
        for name in chosen:
            measure.check_name(name)
    with arguments.refusing():
        state = processes()
    precision = dtype_of(dtype)
    with arguments.folder("--out", out), arguments.plain_warnings():
        network, tokenizer = load(model, precision, base=base, device_map=device_map, quantize=quantize)
        for name in chosen:
            with arguments.refusing("--model", out="--out", folder="--out", tokens="--tokens"):
                found = measure.probe(
                    network,
                    tokenizer,
                    name,
                    wanted,
                    tokens=tokens,
                    texts=texts,
                    seed=seed,
                    batch_size=batch_size,
                    out=None if out is None else out / name,
                    about={"model": model},
                )
            if state.is_main_process:
                print(f"{found.summary()}\n{tokens:,} tokens in each text, {model}, {network.dtype}")
                print(f"\n{found.table(against)}")
                print(f"\nRecalled by tokens since the last use:\n\n{found.by_distance()}\n")
                if against is not None:
                    print(f"Recalled - {against} by tokens since the last use:\n\n{found.by_distance(against)}\n")
    state.destroy_process_group()
