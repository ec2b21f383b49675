"""The demo of a pretrained model: it reads a real chain of thought with several caches, and writes with a small one."""

import time
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from transformers import Cache, DynamicCache, TextStreamer

from .. import RaaSCache, WindowCache, load_model, read
from ..cache.paged_layer import PagedLayer
from ..common import arguments
from ..common.measure import kv_nbytes
from ..common.upstream import CACHE_ARGUMENT
from ..fidelity.texts import load_texts, token_ids


SHARE = 0.33
"""The default budget, as a share of the tokens of prompt and chain."""
CHAIN_TOKENS = 384
"""Tokens of the chain that the model reads with each cache."""
QUESTION = "Explain in a few sentences why the sky is blue.\n\n"
NEW_TOKENS, WRITING_BUDGET = 120, 64
"""The text that the model writes is twice as long as the budget, so that pages are evicted."""


def read_and_write(
    console: Console, name: str, base: str | None, budgets: list[int] | None, alpha: float, page_size: int
) -> None:
    """Read the first trace of this package with each cache, show the loss and the bytes, and write a text."""
    with arguments.refusing("--model", base="--base"), console.status(f"loading {name}"):
        model, tokenizer = load_model(name, base=base, dtype=torch.float32)
    text = token_ids(load_texts(limit=1)[0], tokenizer)
    ids = torch.tensor([text.prompt + text.chain[:CHAIN_TOKENS]])  # [1, tokens]
    prompt, tokens = len(text.prompt), ids.shape[1]
    of_raas = partial(RaaSCache, alpha=alpha, page_size=page_size, min_decode_pages=1)
    window = partial(WindowCache, page_size=page_size, min_decode_pages=1)
    lines: list[tuple[str, str, Cache]] = [("dynamic", "none", DynamicCache(config=model.config))]
    with arguments.refusing(alpha="--alpha", budget="--budget"):
        for budget in dict.fromkeys(budgets or [round(SHARE * tokens)]):
            for method, new_cache in (("window", window), ("raas", of_raas)):
                lines.append((method, f"{budget} ({budget / tokens:.0%})", new_cache(budget, config=model.config)))

    console.print(f"{name} reads a chain of thought, token by token, with each cache:\n")
    console.print(f"{tokenizer.decode(ids[0, : prompt + 60])} ...", markup=False)
    table = Table(title=f"\n{prompt} tokens of prompt and {tokens - prompt} of chain; dynamic is DynamicCache")
    table.caption = "Loss: nats per token of the chain. Window: the prompt and the newest tokens."
    for header in ("Cache", "Budget", "Loss", "Difference", "Tokens/s", "KV"):
        table.add_column(header, justify="left" if header == "Cache" else "right")
    losses: list[float] = []
    for method, limit, cache in lines:
        with console.status(f"{method}: {tokens} tokens"), arguments.refusing("--budget"):
            started = time.perf_counter()
            losses.append(read(model, ids, prompt, cache).mean().item())
        speed = (tokens - prompt) / (time.perf_counter() - started)
        difference = f"{losses[-1] - losses[0]:+.3f}" if method != "dynamic" else "-"
        size = f"{kv_nbytes(cache) / 1e6:.1f} MB"
        table.add_row(method, limit, f"{losses[-1]:.3f}", difference, f"{speed:,.0f}", size)
    console.print(table)

    bounded = of_raas(WRITING_BUDGET, config=model.config)
    console.print(f"\n{name} writes with RaaSCache(budget={WRITING_BUDGET}, {page_size=}, {alpha=}):\n")
    question = tokenizer(QUESTION, return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, CACHE_ARGUMENT: bounded}
    with arguments.refusing("--page-size"):
        out: torch.Tensor = model.generate(**question, streamer=TextStreamer(tokenizer), **options)  # type: ignore[operator]
    paged = next(index for index, layer in enumerate(bounded.layers) if isinstance(layer, PagedLayer))
    held = bounded.resident_tokens(paged)[0, 0]
    console.print(f"\nThe cache holds {held} of {out.shape[1] - 1} tokens.")
