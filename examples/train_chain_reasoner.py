"""Train the embedded model: a small Llama that solves `raas_cache.eval.chains` problems line by line.

    python examples/train_chain_reasoner.py train --out runs/chain --workers 14    # --resume continues a run
    python examples/train_chain_reasoner.py evaluate runs/chain/model --lines 50 --lines 100 --count 500

Training uses dense attention only, in float32. Problems become longer in stages. A stage ends when the accuracy of each
kind of token is high enough, measured with teacher forcing on held-out problems. Batch ``k`` depends only on the seed,
on ``k`` and on the stage, so a resumed run gets the same batches as an uninterrupted run, with any number of workers.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from raas_cache.common.statistics import wilson_interval
from raas_cache.eval import Setting, chain_task, run
from raas_cache.eval.chains import (
    TOKENS_OF_ANSWER,
    TOKENS_PER_LINE,
    VOCABULARY,
    ChainProblem,
    lifetimes,
    make_problem,
    problems,
    reuse_gaps,
)


STAGES = ((3, 6), (4, 12), (8, 24), (16, 48), (24, 80), (4, 112))
"""Smallest and largest number of lines of a problem in each stage. Training stays in the last stage."""
PASS_MARK = 0.97
"""A stage ends when the worst kind of token reaches this accuracy."""
TAIL = TOKENS_OF_ANSWER + 1
"""Tokens after the last 12-token line: the line of the answer and the end token."""
CITED_DIGIT = 7
KINDS = {"left name": 1, "operator": 2, "cited name": 3, "left digit": 5, "cited digit": CITED_DIGIT, "result": 10}
"""The tokens of a line that are hard to predict, and their position in the line."""
CITED_WEIGHT = 4.0
"""Loss weight of the cited digit (one token in twelve), which needs the look-up of a milestone."""
EDGE_WEIGHT = 0.1
"""Loss weight of the first line and of the end. Each occurs once per chain, however long the chain is."""

disable_progress_bar()  # the model has one shard only
app = typer.Typer(add_completion=False, help=__doc__.splitlines()[0])


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the task. An unknown word raises an error instead of becoming <unk>."""
    tokens = ["<pad>", "<s>", "</s>", *VOCABULARY]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,  # it would remove the space before "?"
        model_max_length=4096,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int) -> LlamaForCausalLM:
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            attention_bias=True,  # with RoPE, a bias lets a head attend to a fixed distance
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            initializer_range=0.04,
            tie_word_embeddings=False,
            **special,
        )
    )
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=2048, **special)
    return model


class Batches(Dataset):
    """Item ``k`` is batch ``k``: token ids ``[batch, tokens]`` without padding, and the length of the prompts."""

    def __init__(self, vocabulary: dict[str, int], lines: tuple[int, int], tokens: int, seed: int, length: int) -> None:
        self.vocabulary, self.lines, self.tokens, self.seed, self.length = vocabulary, lines, tokens, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        rng = random.Random(f"{self.seed}/{index}")
        num_lines, num_givens = rng.randint(*self.lines), rng.randint(2, 8)
        batch = []
        while not batch or len(batch) * len(batch[0]) < self.tokens:
            # Half of the problems cite any earlier value, so that the model learns look-up at every distance.
            live_size = rng.choice((None, None, None, 2, 4, 6))
            batch.append(make_problem(num_lines, rng, split="train", num_givens=num_givens, live_size=live_size))
            batch[-1] = encode(batch[-1], self.vocabulary)
        return torch.tensor(batch), len(batch[0]) - TOKENS_PER_LINE * num_lines - TAIL


def encode(problem: ChainProblem, vocabulary: dict[str, int]) -> list[int]:
    """Token ids of prompt and completion. The tokenizer gives the same ids, but is slower."""
    return [vocabulary[token] for token in f"<s> {problem.prompt} {problem.chain} </s>".split()]


def chain_loss(model: LlamaForCausalLM, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Mean cross-entropy of the completion in ``ids`` ``[batch, tokens]``. The prompt is random, so it is left out."""
    logits = model(ids[:, :-1], use_cache=False, logits_to_keep=ids.shape[1] - prompt).logits
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, prompt:], reduction="none")
    loss[:, CITED_DIGIT:-TAIL:TOKENS_PER_LINE] *= CITED_WEIGHT
    return loss.mean() + EDGE_WEIGHT * (loss[:, :TOKENS_PER_LINE].mean() + loss[:, -TAIL:].mean())


@torch.no_grad()
def accuracy_by_kind(model: LlamaForCausalLM, vocabulary: dict[str, int], num_lines: int) -> dict[str, float]:
    """Teacher-forced accuracy on validation problems: per kind of token, and ``chain`` for wholly correct chains."""
    ids = torch.tensor([encode(p, vocabulary) for p in problems(64, num_lines, seed=0, split="validation")])
    completion = TOKENS_PER_LINE * num_lines + TAIL
    ids = ids.to(model.device)
    logits = model(ids[:, :-1], use_cache=False, logits_to_keep=completion).logits
    right = logits.argmax(-1) == ids[:, -completion:]
    by_place = right[:, :-TAIL].unflatten(1, (num_lines, TOKENS_PER_LINE)).float().mean((0, 1))
    kinds = {kind: by_place[place].item() for kind, place in KINDS.items()}
    return kinds | {"chain": right.all(1).float().mean().item()}


def greedy_exact(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sample: list[ChainProblem], batch_size: int
) -> int:
    """Number of problems for which greedy decoding with transformers' default cache gets every token right."""
    rows = run(model, tokenizer, chain_task(sample), [Setting("dynamic")], batch_size=batch_size)
    return sum(row.correct for row in rows)


def learning_rate_scale(progress: float, step: int) -> float:
    """Warm up over 200 steps, stay constant, then decay linearly to 0 over the last 40 % of the steps or minutes."""
    return min(1.0, (step + 1) / 200, max(0.0, 1 - progress) / 0.4)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint.pt, log.jsonl and model/.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps in all.")] = 1_000_000,
    minutes: Annotated[float, typer.Option(help="Stop early, with a checkpoint, after this much training.")] = 5.2,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 8192,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    hidden_size: int = 128,
    layers: int = 3,
    seed: int = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations, which also save.")] = 500,
    workers: Annotated[int, typer.Option(help="Data worker processes.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
) -> None:
    """Train from scratch, or go on."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    vocabulary = tokenizer.get_vocab()
    model = build_model(tokenizer, hidden_size, layers).to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=device == "cuda")
    step, stage, tokens, seconds = 0, 0, 0, 0.0
    if resume:
        state = torch.load(out / "checkpoint.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        step, stage, tokens, seconds = (state[key] for key in ("step", "stage", "tokens", "seconds"))

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        state |= {"step": step, "stage": stage, "tokens": tokens, "seconds": seconds}
        torch.save(state, out / "checkpoint.tmp")
        (out / "checkpoint.tmp").replace(out / "checkpoint.pt")  # a kill while saving leaves the last one whole
        model.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")

    bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, mininterval=1.0)
    before, start = seconds, time.monotonic()
    while step < steps and seconds < 60 * minutes:
        # Use a new loader for each stage, so that no batch of the stage before has been prefetched.
        data = Batches(vocabulary, STAGES[stage], batch_tokens, seed, steps)
        loader = DataLoader(data, batch_size=None, sampler=range(step, steps), num_workers=workers)
        for ids, prompt in loader:
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate_scale(max(step / steps, seconds / (60 * minutes)), step)
            loss = chain_loss(model, ids.to(device), prompt)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, tokens, seconds = step + 1, tokens + ids.numel(), before + time.monotonic() - start
            bar.update()
            if step % eval_every and step < steps and seconds < 60 * minutes:
                continue
            accuracy = accuracy_by_kind(model, vocabulary, STAGES[stage][1])
            record = {"step": step, "stage": stage, "tokens": tokens, "seconds": round(seconds), "loss": loss.item()}
            record |= {key: round(value, 4) for key, value in accuracy.items()}
            bar.write(json.dumps(record))
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            passed = stage + 1 < len(STAGES) and min(accuracy[kind] for kind in KINDS) > PASS_MARK
            stage += passed
            save()
            if passed or seconds >= 60 * minutes:
                break
    bar.close()
    evaluate(out / "model", lines=[50, 100], count=100, batch_size=100, seed=0, split="validation")


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A folder written by save_pretrained.")],
    lines: Annotated[list[int], typer.Option(help="Lines of a problem; repeat for several.")] = [50, 100],  # noqa: B006
    count: int = 500,
    batch_size: int = 50,
    seed: int = 0,
    split: str = "test",
) -> None:
    """Print reuse gaps and lifetimes of milestones, and the share of exact chains (greedy, fp32) with its interval."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    for num_lines in lines:
        sample = problems(count, num_lines, seed, split=split)
        for name, values in (("reuse gap", reuse_gaps(sample)), ("lifetime", lifetimes(sample))):
            half, nine_tenths = (sorted(values)[int(q * len(values))] for q in (0.5, 0.9))
            print(f"{num_lines} lines: {name} p50 {half}, p90 {nine_tenths}, max {max(values)} lines", flush=True)
        exact = greedy_exact(model, tokenizer, sample, batch_size)
        low, high = wilson_interval(exact, count)
        share = f"{exact}/{count} = {exact / count:.1%}"
        print(f"{num_lines} lines, {split}: {share} exact [{low:.1%}, {high:.1%}]", flush=True)


if __name__ == "__main__":
    app()
