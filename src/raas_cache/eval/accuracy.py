"""How much of a chain a model gets right with a given cache, and what that costs."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from .chains import ChainProblem, is_exact


@dataclass(frozen=True)
class Accuracy:
    """Greedy decoding of a sample of chain problems.

    Args:
        exact: for each problem, whether every token of the chain is right, up to the end.
        right: for each problem, the share of the chain that is right before the first error.
        nbytes: bytes of K and V for each problem at the end of its chain.
        seconds: time of all `generate` calls.
        steps: forwards of one token, over all batches.
    """

    exact: list[bool]
    right: list[float]
    nbytes: float
    seconds: float
    steps: int

    @property
    def share_exact(self) -> float:
        return sum(self.exact) / len(self.exact)

    @property
    def share_right(self) -> float:
        return sum(self.right) / len(self.right)

    @property
    def ms_per_step(self) -> float:
        return 1e3 * self.seconds / self.steps


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share."""
    z, share = 1.959964, successes / trials
    middle = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, (middle - spread) / (1 + z * z / trials)), (middle + spread) / (1 + z * z / trials)


def tokens_of(problem: ChainProblem) -> int:
    """Tokens of the problem, its chain and the end token included."""
    return len(f"<s> {problem.prompt} {problem.chain} </s>".split())


def completion_length(sample: list[ChainProblem]) -> int:
    """Tokens of the longest chain, the end token included."""
    return max(len(problem.chain.split()) for problem in sample) + 1


@torch.no_grad()
def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sample: list[ChainProblem],
    new_cache: Callable[[], Cache],
    batch_size: int = 100,
) -> Accuracy:
    """Let the model work out the problems, each batch with a cache of its own.

    Args:
        sample: problems of equal length, so that all chains of a batch end together.
        new_cache: makes an empty cache.
    """
    exact, right, nbytes, steps, started = [], [], 0, 0, time.perf_counter()
    for start in range(0, len(sample), batch_size):
        part, cache = sample[start : start + batch_size], new_cache()
        inputs = tokenizer([p.prompt for p in part], padding=True, return_tensors="pt", return_token_type_ids=False)
        # Chains too short to win back what a GPU would spend on compiling each method.
        options = {"max_new_tokens": completion_length(part), "do_sample": False, "disable_compile": True}
        out = model.generate(**inputs.to(model.device), past_key_values=cache, **options)
        out = out[:, inputs["input_ids"].shape[1] :]
        steps += out.shape[1]
        nbytes += kv_nbytes(cache)
        for completion, problem in zip(tokenizer.batch_decode(out, skip_special_tokens=True), part, strict=True):
            words, gold = completion.split(), problem.chain.split()
            same = [ours == theirs for ours, theirs in zip(words, gold, strict=False)] + [False]
            exact.append(is_exact(completion, problem))
            right.append(min(same.index(False), len(gold)) / len(gold))
    return Accuracy(exact, right, nbytes / len(sample), time.perf_counter() - started, steps)


def kv_nbytes(cache: Cache) -> int:
    """Bytes of K and V that a paged cache, or a cache of transformers, has allocated."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
