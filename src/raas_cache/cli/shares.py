"""The `shares` command: learn a share of the budget for each KV head, and write the shares to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..cache.shares_file import write_shares
from ..common import arguments
from ..eval.model_options import Base, DeviceMap, Dtype, ModelName, Quantize, dtype_of, load
from ..fidelity.command import ChainTokens, Data, PageSize, Rows, budgets_of
from ..fidelity.texts import TRACES, Ids, load_texts, long_enough
from ..sizing.learn_shares import learn_shares


def shares(
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    model: ModelName = "smollm2",
    data: Data = TRACES,
    budget: Annotated[
        str, typer.Option(help="Mean budget of a KV head: tokens, or a share of --tokens (25%). The prompt counts.")
    ] = "25%",
    tokens: ChainTokens = 1024,
    rows: Rows = None,
    sizes: Annotated[
        int, typer.Option(min=1, help="Most different shares in a layer. Each costs one attention call per step.")
    ] = 2,
    page_size: PageSize = 16,
    base: Base = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
) -> None:
    """Learn from chains of thought how many pages each KV head needs, for RaaSCache(budget, shares=FILE)."""
    if out.is_dir():
        raise typer.BadParameter(f"'{out}' is a folder: give the name of a file.", param_hint="--out")
    each = budgets_of(budget, tokens, "--budget")
    if len(each) > 1:
        raise typer.BadParameter(f"{budget!r} must be one budget.", param_hint="--budget")
    with arguments.refusing("--data"):
        texts = load_texts(data, rows)
    with arguments.refusing():
        precision = dtype_of(dtype)
    with arguments.folder("--out", out.parent), arguments.plain_warnings():
        network, tokenizer = load(model, precision, base=base, device_map=device_map, quantize=quantize)
        with arguments.refusing("--data", budget="--budget", tokens="--tokens", model="--model"):
            long = [ids for _, ids in long_enough(texts, tokenizer, tokens)]
            prompts = [len(ids.prompt) for ids in long]
            learnt = learn_shares(
                network,
                _packed(long, min(prompts) + tokens).to(network.device),
                prompts,
                each[0],
                page_size=page_size,
                sizes=sizes,
            )
        with arguments.refusing("--out"):
            about: dict[str, str | int] = {
                "model": model,
                "budget": each[0],
                "prompt": max(prompts),
                "page_size": page_size,
            }
            write_shares(out, learnt, about)
    print(f"{len(long)} texts from {data}, {tokens:,} tokens each, {model}, {network.dtype}")
    if len(long) < len(texts):
        print(f"{len(texts) - len(long)} of {len(texts)} texts have shorter chains and are left out.")
    print(f"{out}: shares of the KV heads of {len(learnt)} layers\n")
    print(f"RaaSCache(budget={each[0]}, page_size={page_size}, shares={str(out)!r})")


def _packed(texts: list[Ids], length: int) -> torch.Tensor:
    """Prompts and chains `[rows, length]`, cut to the same number of tokens."""
    return torch.tensor([(ids.prompt + ids.chain)[:length] for ids in texts])
