"""Train a LoRA adapter with which SmolLM2-135M-Instruct solves the word problems of `raas_cache.eval.word_problems`.

    python examples/train_word_problems.py --out examples/word_problem_solver

With `--seconds 225`, training took 652 steps on an H100. It uses dense attention only. Problems become longer in two
stages. At the end the script prints, for each family of problems, the share of test problems whose whole solution is
right under greedy decoding with dense attention. One forward over the solution tells it, because every token must be
the most likely one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from raas_cache import pretrained
from raas_cache.eval.word_problems import FAMILIES, problems


STAGES = ((24, 0.3, 26), (44, 1.0, 14))
"""People in a problem, the share of all steps after which the stage ends, and rows in a batch, half of each family."""
IGNORED = -100


class Batches(IterableDataset):
    """Token ids `[rows, tokens]` of problems with solutions, padded on the right. Batch k depends only on seed and k.

    All problems of a family have the same number of tokens if they have the same number of people.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, people: int, rows: int, seed: int, split: str = "train"):
        self.tokenizer, self.people, self.rows, self.seed, self.split = tokenizer, people, rows, seed, split

    def batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids, and the labels: the next token where it is part of a solution or ends it, otherwise `IGNORED`."""
        ids, labels = [], []
        for family in FAMILIES:
            seed = self.seed * 1_000_000 + number
            for one in problems(self.rows // len(FAMILIES), self.people, family, seed, split=self.split):
                problem, solution = self.tokenizer([one.problem, one.solution])["input_ids"]
                whole = [*problem, *solution, self.tokenizer.eos_token_id]
                ids.append(whole[:-1])
                labels.append([IGNORED] * (len(problem) - 1) + whole[len(problem) :])
        longest = max(map(len, ids))
        padded = [row + [self.tokenizer.eos_token_id] * (longest - len(row)) for row in ids]
        targets = [row + [IGNORED] * (longest - len(row)) for row in labels]
        return torch.tensor(padded), torch.tensor(targets)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        number, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        while True:
            yield self.batch(number)
            number += step


def logits_at(model: PeftModel, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Logits `[places, vocabulary]` at some flat positions of `ids` `[rows, tokens]`: all of them need much memory."""
    causal = model.get_base_model()
    with torch.autocast(ids.device.type, torch.bfloat16, cache_enabled=False):
        hidden = causal.model(ids, use_cache=False).last_hidden_state
        return causal.lm_head(hidden.flatten(0, 1)[places])


def graphed(forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *like: torch.Tensor):
    """`forward` with its backward pass as one CUDA graph, for inputs of the same shapes; on a CPU, without a graph."""

    def eager(*inputs: torch.Tensor) -> torch.Tensor:
        loss = forward(*inputs)
        loss.backward()
        return loss.detach()

    if like[0].device.type != "cuda":
        return eager
    buffers = [tensor.clone() for tensor in like]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager(*buffers)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = eager(*buffers)

    def replay(*inputs: torch.Tensor) -> torch.Tensor:
        for buffer, given in zip(buffers, inputs, strict=True):
            buffer.copy_(given)
        graph.replay()
        return loss

    return replay


@torch.no_grad()
def solved(model: PeftModel, tokenizer: PreTrainedTokenizerBase, people: int, rows: int) -> dict[str, float]:
    """For each family, the share of test problems whose whole solution is the greedy one."""
    data = Batches(tokenizer, people, 10, 0, split="test")
    right = torch.zeros(len(FAMILIES))
    for number in range(rows // 10):
        ids, labels = (tensor.to(model.device) for tensor in data.batch(number))
        places = (labels.flatten() != IGNORED).nonzero().flatten()
        wrong = torch.zeros_like(labels, dtype=torch.bool).flatten()
        wrong[places] = logits_at(model, ids, places).argmax(-1) != labels.flatten()[places]
        right += (~wrong.view_as(labels).any(-1)).view(len(FAMILIES), -1).float().mean(-1).cpu()
    return {family: round(float(share), 4) for family, share in zip(FAMILIES, right / (rows // 10), strict=True)}


def main(
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("examples/word_problem_solver"),
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps.")] = 1500,
    seconds: Annotated[float, typer.Option(help="End earlier, after about so many seconds.")] = float("inf"),
    rate: Annotated[float, typer.Option(help="Largest learning rate.")] = 1e-3,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the adapter and of the problems.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make batches.")] = 6,
    rows: Annotated[int, typer.Option(min=10, help="Test problems per family at the end.")] = 200,
    shrink: Annotated[int, typer.Option(min=1, help="Divide the sizes of problems and batches, for a trial.")] = 1,
) -> None:
    """Train, save the adapter, and print how many test problems the model solves."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = pretrained("smollm2", dtype=torch.bfloat16)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: PeftModel = get_peft_model(base, config).to(device).train()  # type: ignore[assignment]
    weights = [weight for weight in model.parameters() if weight.requires_grad]  # float32
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    started, step, done = time.perf_counter(), 0, 0.0
    for people, end, size in STAGES:
        data = Batches(tokenizer, people // shrink, max(2, size // shrink), seed + people)
        loader = DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
        run = None
        for ids, labels in loader:
            ids, labels = ids.to(device), labels.to(device)
            if run is None:
                places = (labels.flatten() != IGNORED).nonzero().flatten()  # the same in every batch of a stage
                run = graphed(
                    lambda x, y, at=places: cross_entropy(logits_at(model, x, at).float(), y.flatten()[at]), ids, labels
                )
                optimizer.zero_grad(set_to_none=False)
            done = max(step / steps, (time.perf_counter() - started) / seconds)
            if done >= end:
                break
            for group in optimizer.param_groups:  # a short rise, then a linear fall
                group["lr"] = rate * min(1.0, (step + 1) / 50) * (1 - done)
            for weight in weights:
                if weight.grad is not None:
                    weight.grad.zero_()
            loss = run(ids, labels)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            step += 1
            if step % 50 == 0 or step < 3:
                spent = time.perf_counter() - started
                print(f"step {step}, {people} people, loss {loss.item():.5f}, {spent:.0f} s", flush=True)
        del loader
    for weight in weights:
        weight.data = weight.data.to(torch.bfloat16)
    model.eval()
    model.peft_config["default"].base_model_name_or_path = "smollm2"
    model.save_pretrained(out)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id).save_pretrained(out)
    shares = {"solved": solved(model, tokenizer, STAGES[-1][0] // shrink, rows), "problems": rows}
    about = {"steps": step, "seed": seed, "rate": rate, "rank": rank, **shares, "torch": torch.__version__}
    (out / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    print(about)


if __name__ == "__main__":
    typer.run(main)
