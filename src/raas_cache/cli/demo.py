"""`raas-cache demo`: the embedded model solves problems with a bounded cache, or a pretrained model reads a trace."""

import math
import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from .. import RaaSCache, embedded_model, pretrained
from ..common import arguments
from ..common.measure import kv_nbytes
from ..common.upstream import CACHE_ARGUMENT
from ..eval import chains
from ..eval.chains import ChainProblem, completion_length
from ..eval.model_options import Base, ModelName
from ..methods.raas import DEFAULT_ALPHA
from ..models.load import ALIAS
from ..models.pretrained import EMBEDDED
from .demo_reading import SHARE, read_and_write


PAGE_SIZE = 4
DEMO_SHARES = (0.75, 0.5, 0.33)
"""The default budgets, as shares of the tokens of prompt and chain."""
DEMO_PROBLEMS, DEMO_LINES, DEMO_SEED = 24, 50, 0
MOST_PROBLEMS, MOST_TOKENS = 10_000, 100_000
"""Upper limits of the demo: a larger batch takes too long, and no chain can fill a larger budget."""


def demo(
    model: ModelName = ALIAS,
    base: Base = None,
    problems: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_PROBLEMS,
            help="Problems in the table. They run as one batch.",
            show_default=str(DEMO_PROBLEMS),
        ),
    ] = None,
    lines: Annotated[
        int | None,
        typer.Option(
            min=1, help="Lines of a problem. The model writes 12 tokens per line.", show_default=str(DEMO_LINES)
        ),
    ] = None,
    budget: Annotated[
        list[int] | None,
        typer.Option(
            max=MOST_TOKENS,
            help="Tokens that the cache holds per problem, prompt included. Repeat the option for several budgets.",
            show_default=", ".join(f"{share:.0%}" for share in DEMO_SHARES)
            + f" of the tokens; with a pretrained model {SHARE:.0%}",
        ),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Attention weight from which a page is a milestone.")] = DEFAULT_ALPHA,
    page_size: Annotated[
        int,
        typer.Option(
            min=1, max=arguments.LARGEST, callback=arguments.power_of_two, help="Tokens per page, a power of two."
        ),
    ] = PAGE_SIZE,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=arguments.LARGEST_SEED,
            help="Seed of the problems (held out from training).",
            show_default=str(DEMO_SEED),
        ),
    ] = None,
) -> None:
    """Stream one chain of thought, then compare RaaS with transformers' DynamicCache.

    Any other model cannot solve the problems of the embedded model. It reads a real chain of thought with each
    cache, and writes a text.
    """
    disable_progress_bar()
    console = Console(highlight=False)
    if model not in (ALIAS, EMBEDDED):
        for option, value in (("--problems", problems), ("--lines", lines), ("--seed", seed)):
            if value is not None:
                raise typer.BadParameter(f"remove it: only --model {ALIAS} takes it.", param_hint=option)
        read_and_write(console, model, base, budget, alpha, page_size)
        return
    if base is not None:
        raise typer.BadParameter(f"remove it: --model {ALIAS} is no LoRA adapter.", param_hint="--base")
    sizes = problems or DEMO_PROBLEMS, DEMO_LINES if lines is None else lines, seed or DEMO_SEED
    _solve(console, *sizes, budget, alpha, page_size)


def _solve(
    console: Console, problems: int, lines: int, seed: int, budget: list[int] | None, alpha: float, page_size: int
) -> None:
    """Let the embedded model solve problems with each cache."""
    with arguments.refusing("--lines"):
        sample = chains.problems(problems, lines, seed)
    # The model is too small for several cores: threads save little, and on a busy machine they can cost a factor of 20.
    torch.set_num_threads(1)
    try:
        model, tokenizer = pretrained(EMBEDDED)
    except Exception as error:  # the readers of JSON and safetensors raise many kinds of errors
        raise typer.BadParameter(
            f"the embedded model in {embedded_model()!r} cannot be loaded ({type(error).__name__}: {error}): install "
            "raas-cache again."
        ) from None

    prompt, chain = len(tokenizer(sample[0].prompt)["input_ids"]), completion_length(sample)
    # The smallest budget: the prompt and one decode page. With a smaller budget, the cache would exceed it.
    least = (math.ceil(prompt / page_size) + 1) * page_size
    budgets = budget or [max(round(share * (prompt + chain)), least) for share in DEMO_SHARES]
    if min(budgets) < least:
        reason = f"{min(budgets)} leaves no page beside the prompt's {prompt} tokens: give at least {least}."
        raise typer.BadParameter(reason, param_hint="--budget")
    with arguments.refusing(alpha="--alpha"):
        caches = [RaaSCache(b, page_size=page_size, alpha=alpha, min_decode_pages=1) for b in dict.fromkeys(budgets)]

    console.print(f"[bold]A problem[/], {prompt} tokens:\n\n{sample[0].prompt}\n")
    shown = caches[len(caches) // 2]
    console.print(f"[bold]The model's chain[/] with RaaSCache(budget={shown.budget}, {page_size=}, {alpha=}):\n")
    _generate(model, tokenizer, sample[:1], shown, _ChainPrinter(console, tokenizer, sample[0], shown))
    shown.reset()

    table = Table(title=f"\n{problems} problems of {prompt} + {chain} tokens in one batch; dynamic is DynamicCache")
    table.caption = "Exact: every token of the chain is correct. Budget and KV include the prompt."
    for header in ("Cache", "Budget", "Exact", "Answers", "Tokens/s", "KV", "Pages evicted"):
        table.add_column(header, justify="left" if header == "Cache" else "right")
    for cache in (DynamicCache(), *caches):
        with console.status(f"{type(cache).__name__}: {problems} problems"):
            completions, speed = _generate(model, tokenizer, sample, cache)
        exact = sum(map(chains.is_exact, completions, sample))
        right = sum(chains.answer_of(text) == problem.answer for text, problem in zip(completions, sample, strict=True))
        name, limit, size, evicted = "dynamic", "none", kv_nbytes(cache), "-"
        if isinstance(cache, RaaSCache) and isinstance(cache.budget, int):
            name, limit = "raas", f"{cache.budget} ({cache.budget / (prompt + chain):.0%})"
            evicted = f"{problems * cache.evictions:,}"
        counts = f"{exact}/{problems}", f"{right}/{problems}"
        table.add_row(name, limit, *counts, f"{speed:,.0f}", f"{size / 1e6:.1f} MB", evicted)
    console.print(table)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sample: list[ChainProblem],
    cache: Cache,
    streamer: "_ChainPrinter | None" = None,
) -> tuple[list[str], float]:
    """Generate a batch greedily. Returns the completions and the new tokens per second."""
    inputs = tokenizer([p.prompt for p in sample], padding=True, return_tensors="pt", return_token_type_ids=False)
    options = {CACHE_ARGUMENT: cache, "max_new_tokens": completion_length(sample), "do_sample": False}
    started = time.perf_counter()
    with arguments.refusing():
        text: torch.Tensor = model.generate(**inputs, streamer=streamer, **options)  # type: ignore[operator]
    new = text[:, inputs["input_ids"].shape[1] :]
    speed = (new != tokenizer.pad_token_id).sum().item() / (time.perf_counter() - started)
    return tokenizer.batch_decode(new, skip_special_tokens=True), speed


class _ChainPrinter:
    """A streamer for `generate`: prints each line of the chain, whether it is correct, and the tokens held."""

    def __init__(self, console: Console, tokenizer: PreTrainedTokenizerBase, problem: ChainProblem, cache: RaaSCache):
        self.console, self.tokenizer, self.cache = console, tokenizer, cache
        self.gold = iter(problem.chain.replace("; ", ";\n").splitlines())
        self.line: list[str] | None = None

    def put(self, ids: torch.Tensor) -> None:
        """Called by `generate` with the prompt, and then with each new token."""
        if self.line is None:
            self.line = []
            return
        word: str = self.tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[assignment]
        if word:
            self.line.append(word)
            self.console.print(word, end=" ")
            if word == ";":
                self.end()

    def end(self) -> None:
        """Finish the current line."""
        text, self.line = " ".join(self.line or []), []
        verdict = "[green]right[/]" if text == next(self.gold, None) else "[red]wrong[/]"
        held, seen = self.cache.resident_tokens(0)[0, 0], self.cache.get_seq_length()
        self.console.print(f"{' ' * (36 - len(text))}{verdict}  holds {held} of {seen} tokens")
