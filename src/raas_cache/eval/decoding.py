"""Generates batches of a task, and tells of each row when it has ended."""

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
"""New tokens up to which a GPU would not win back what it spends on compiling each setting."""
COLDEST = 0.001
"""The least temperature that is sampled at: by less, logits overflow."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Args:
        max_new_tokens: after which a chain is cut off; None for what the task says.
        temperature: 0 for greedy decoding, where a row's result does not depend on the batch that it is in.
        top_p: share of the probability that is sampled from.
        seed: of sampling, together with the batch: the same with any number of processes. Below 2**32.

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
            raise ValueError(f"temperature={self.temperature} must be 0, or a finite number from {COLDEST} on.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1].")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed} must be from 0 to {(1 << 32) - 1}.")

    def options(self, task: Task) -> dict[str, Any]:
        """For `generate`."""
        limit = self.max_new_tokens or task.max_new_tokens
        # None where the model's own generation config would have its say.
        chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature:
            chosen = {"do_sample": True, "temperature": float(self.temperature), "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": limit, "disable_compile": limit <= SHORT, **chosen}


class Decoder:
    """A model at work on a task.

    Args:
        decoding: how tokens are chosen.

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
        """Generate some rows of the task as one batch.

        Args:
            keep: is handed each row when it has ended.
            on_token: is told after each token how many there are.
        """
        cache = setting.new_cache(self.model.config)
        prompt_length = max(len(self.ids[index]) for index in rows)
        padding = [prompt_length - len(self.ids[index]) for index in rows]
        lists = {
            "input_ids": [[self.pad] * empty + self.ids[index] for empty, index in zip(padding, rows, strict=True)],
            "attention_mask": [[0] * empty + [1] * (prompt_length - empty) for empty in padding],
        }
        inputs = {name: torch.tensor(value, device=self.model.device) for name, value in lists.items()}
        torch.manual_seed(self.decoding.seed * 1_000_003 + rows[0])  # of which the CPU takes 32 bits
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
            # A prompt over the budget is marked in its row.
            warnings.filterwarnings("ignore", "budget=.* leaves", UserWarning)
            options[CACHE_ARGUMENT] = cache
            sequences: torch.Tensor = self.model.generate(**inputs, **options)  # type: ignore[operator]
        for place in range(len(rows)):
            if place not in watch.ended:
                finish(place, sequences[place, prompt_length:], True)


class _RowEnds(StoppingCriteria):
    """Stops nothing; tells of each row that has just written its end token."""

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
        """Called by `generate` after each token."""
        for place in torch.isin(input_ids[:, -1], self.end).nonzero().flatten().tolist():
            if place not in self.ended:
                self.ended.add(place)
                self.finish(place, input_ids[place, self.prompt_length :], False)
        self.on_token(input_ids.shape[1] - self.prompt_length)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]
