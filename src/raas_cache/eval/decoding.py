"""Generate the batches of a task, and report each row as soon as it ends."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..cache.paged_cache import PagedCache
from ..common.measure import evictions, kv_nbytes
from ..common.upstream import CACHE_ARGUMENT
from .results import Row
from .settings import Setting
from .tasks import Task, hash_of


SHORT = 2048
"""Up to this many new tokens, compiling a setting takes longer on a GPU than it saves."""
COLDEST = 0.001
"""The smallest temperature for sampling. Division by a smaller temperature makes logits overflow."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Args:
        max_new_tokens: limit of generated tokens per row; None for the limit of the task.
        temperature: 0 for greedy decoding, in which the result of a row does not depend on its batch.
        top_p: sample from the most likely tokens with this total probability.
        seed: seed of sampling, below 2**32. Each batch has its own random numbers, so the number of processes does not
            change the result.

    Raises:
        ValueError: a number is out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 is greedy.")
        if self.temperature and not COLDEST <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be 0, or a finite number of at least {COLDEST}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1].")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed} must be from 0 to {(1 << 32) - 1}.")

    def options(self, task: Task) -> dict[str, Any]:
        """Arguments for `generate`."""
        limit = self.max_new_tokens or task.max_new_tokens
        # None overrides a value in the model's generation config.
        chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature:
            chosen = {"do_sample": True, "temperature": float(self.temperature), "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": limit, "disable_compile": limit <= SHORT, **chosen}


class Decoder:
    """Runs a model on the problems of a task.

    Args:
        decoding: how tokens are chosen.

    Attributes:
        ids: token ids of each prompt.
        hashes: hash of the text of each prompt.
        options: arguments for `generate`.
        pad: id of the padding token.

    Raises:
        ValueError: the tokenizer does not know a word of the task.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    decoding: Decoding
    ids: list[list[int]]
    hashes: list[str]
    options: dict[str, Any]
    pad: int

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, decoding: Decoding):
        self.model, self.tokenizer, self.task, self.decoding = model, tokenizer, task, decoding
        prompts = task.prompts(tokenizer)
        self.ids = task.token_ids(tokenizer, prompts)
        self.hashes = [hash_of(prompt) for prompt in prompts]
        self.options = decoding.options(task)
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad = next(token for token in known if token is not None)

    @torch.no_grad()
    def run(
        self, setting: Setting, rows: tuple[int, ...], keep: Callable[[Row], None], on_token: Callable[[int], None]
    ) -> None:
        """Generate one batch.

        Args:
            rows: indices of the problems in the batch.
            keep: called with each row when the row ends.
            on_token: called after each token with the number of tokens generated so far.
        """
        cache = setting.new_cache(self.model.config)
        prompt_length = max(len(self.ids[index]) for index in rows)
        padding = [prompt_length - len(self.ids[index]) for index in rows]
        lists = {
            "input_ids": [[self.pad] * empty + self.ids[index] for empty, index in zip(padding, rows, strict=True)],
            "attention_mask": [[0] * empty + [1] * (prompt_length - empty) for empty in padding],
        }
        # [rows, prompt_length] each
        inputs = {name: torch.tensor(value, device=self.model.device) for name, value in lists.items()}
        torch.manual_seed(self.decoding.seed * 1_000_003 + rows[0])  # the CPU generator uses the lower 32 bits
        started = time.perf_counter()

        def finish(place: int, new: torch.Tensor, truncated: bool) -> None:
            index = rows[place]
            output: str = self.tokenizer.decode(new, skip_special_tokens=True)  # type: ignore[assignment]
            answer, correct = self.task.mark(output, self.task.golds[index])
            row = Row(
                index=index,
                prompt_hash=self.hashes[index],
                method=setting.method,
                budget=setting.budget,
                options=dict(setting.options),
                output=output,
                answer=answer,
                gold=self.task.golds[index],
                correct=correct,
                prompt_tokens=len(self.ids[index]),
                tokens=len(new),
                truncated=truncated,
                over_budget=isinstance(cache, PagedCache) and cache.is_over_budget,
                seconds=time.perf_counter() - started,
                batch=rows[0],
                kv_bytes=kv_nbytes(cache) // len(rows),
                evictions=evictions(cache),
            )
            keep(row)

        watch = _RowEnds(self.model, prompt_length, finish, on_token)
        options = {"pad_token_id": self.pad, "stopping_criteria": StoppingCriteriaList([watch]), **self.options}
        with warnings.catch_warnings():
            # The row stores `over_budget` instead of a warning.
            warnings.filterwarnings("ignore", "budget=.* leaves", UserWarning)
            options[CACHE_ARGUMENT] = cache
            sequences: torch.Tensor = self.model.generate(**inputs, **options)  # type: ignore[operator]
        for place in range(len(rows)):
            if place not in watch.ended:
                finish(place, sequences[place, prompt_length:], True)


class _RowEnds(StoppingCriteria):
    """A stopping criterion that never stops, and reports each row that has just generated its end token."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_length: int,
        finish: Callable[[int, torch.Tensor, bool], None],
        on_token: Callable[[int], None],
    ):
        end = model.generation_config.eos_token_id
        self.end = torch.tensor([] if end is None else end, device=model.device).flatten()
        self.prompt_length, self.finish, self.on_token = prompt_length, finish, on_token
        self.ended: set[int] = set()

    def __call__(self, input_ids: torch.LongTensor, scores: object, **kwargs: object) -> torch.BoolTensor:
        """Called by `generate` after each token. `input_ids`: `[rows, tokens]`."""
        for place in torch.isin(input_ids[:, -1], self.end).nonzero().flatten().tolist():
            if place not in self.ended:
                self.ended.add(place)
                self.finish(place, input_ids[place, self.prompt_length :], False)
        self.on_token(input_ids.shape[1] - self.prompt_length)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]
