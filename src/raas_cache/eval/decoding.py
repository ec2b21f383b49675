"""Generate the batches of a task, and report each row as soon as it ends."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..cache.paged_cache import PagedCache
from ..common.captured_step import captured_forward
from ..common.measure import device_name, evictions, kv_nbytes
from ..common.upstream import CACHE_ARGUMENT
from .rows import Row
from .sampling import RowSampler
from .settings import Setting
from .tasks import Task, hash_of


Place = tuple[int, int]
"""Index of a problem, and number of a sample."""
COLDEST = 0.001
"""The smallest temperature for sampling. Division by a smaller temperature makes logits overflow."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Args:
        max_new_tokens: limit of generated tokens per row; None for the limit of the task.
        temperature: 0 for greedy decoding, otherwise the temperature of sampling.
        top_p: sample from the most likely tokens with this total probability; 1 for all tokens.
        seed: seed of sampling, below 2**32. Each row has its own random numbers, see `sampling.RowSampler`.
        top_k: sample from this number of most likely tokens; 0 for all tokens.
        samples: number of samples of each problem. More than one needs a temperature above 0.

    Raises:
        ValueError: a number is out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    samples: int = 1

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
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; 0 is all tokens.")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1.")
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"samples={self.samples} needs a temperature above 0, such as 0.6: greedy samples are all the same."
            )

    def limit(self, task: Task) -> int:
        """Limit of new tokens for the rows of a task."""
        return self.max_new_tokens or task.max_new_tokens


class Decoder:
    """Runs a model on the problems of a task.

    Args:
        decoding: how tokens are chosen.

    Attributes:
        ids: token ids of each prompt.
        hashes: hash of the text of each prompt.
        limit: limit of new tokens per row.
        generation_config: the arguments of `generate` that are the same for all batches.
        device: name of the card or the CPU.
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
    limit: int
    generation_config: GenerationConfig
    device: str
    pad: int

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, decoding: Decoding):
        self.model, self.tokenizer, self.task, self.decoding = model, tokenizer, task, decoding
        prompts = task.prompts(tokenizer)
        self.ids = task.token_ids(tokenizer, prompts)
        self.hashes = [hash_of(prompt) for prompt in prompts]
        self.limit = decoding.limit(task)
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad = next(token for token in known if token is not None)
        self.generation_config = GenerationConfig(
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=self.pad,
            do_sample=False,  # `RowSampler` samples
            max_new_tokens=self.limit,
            disable_compile=True,  # `captured_forward` records the decode step, which takes less time
        )
        self.device = device_name(model.device)

    @torch.no_grad()
    def run(
        self, setting: Setting, rows: Sequence[Place], keep: Callable[[Row], None], on_token: Callable[[int], None]
    ) -> None:
        """Generate one batch.

        Args:
            rows: index of the problem and number of the sample for each row of the batch.
            keep: called with each row when the row ends.
            on_token: called after each token with the number of tokens generated so far.
        """
        cache = setting.new_cache(self.model.config)
        prompt_length = max(len(self.ids[index]) for index, _ in rows)
        padding = [prompt_length - len(self.ids[index]) for index, _ in rows]
        lists = {
            "input_ids": [
                [self.pad] * empty + self.ids[index] for empty, (index, _) in zip(padding, rows, strict=True)
            ],
            "attention_mask": [[0] * empty + [1] * (prompt_length - empty) for empty in padding],
        }
        # [rows, prompt_length] each
        inputs = {name: torch.tensor(value, device=self.model.device) for name, value in lists.items()}
        held = _HeldBytes(cache, len(rows))
        started = time.perf_counter()

        def finish(place: int, new: torch.Tensor, truncated: bool) -> None:
            nonlocal started
            index, sample = rows[place]
            output: str = self.tokenizer.decode(new, skip_special_tokens=True)  # type: ignore[assignment]
            ended = time.perf_counter()
            seconds = ended - started
            answer, correct = self.task.mark(output, self.task.golds[index])
            started += time.perf_counter() - ended  # marking may run a program: no row of the batch pays for it
            row = Row(
                index=index,
                sample=sample,
                seed=self.decoding.seed,
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
                seconds=seconds,
                batch=rows[0][1] * len(self.ids) + rows[0][0],
                kv_bytes=held.peak,
                mean_kv_bytes=held.mean,
                evictions=evictions(cache),
                device=self.device,
            )
            keep(row)

        def after_token(tokens: int) -> None:
            held.measure()
            on_token(tokens)

        watch = _RowEnds(self.generation_config.eos_token_id, self.model.device, prompt_length, finish, after_token)
        with warnings.catch_warnings(), _only_special_tokens(self.model), captured_forward(self.model, cache):
            # The row stores `over_budget` instead of a warning.
            warnings.filterwarnings("ignore", "budget=.* leaves", UserWarning)
            sequences: torch.Tensor = self.model.generate(  # type: ignore[operator]
                **inputs,
                generation_config=self.generation_config,
                logits_processor=LogitsProcessorList(self._samplers(rows, prompt_length)),
                stopping_criteria=StoppingCriteriaList([watch]),
                **{CACHE_ARGUMENT: cache},
            )
        for place in range(len(rows)):
            if place not in watch.ended:
                finish(place, sequences[place, prompt_length:], True)

    def _samplers(self, rows: Sequence[Place], prompt_length: int) -> list[RowSampler]:
        """The sampler of a batch; an empty list for greedy decoding."""
        chosen = self.decoding
        if not chosen.temperature:
            return []
        keys = [(chosen.seed, *place) for place in rows]
        return [
            RowSampler(
                keys,
                self.limit,
                prompt_length,
                temperature=chosen.temperature,
                top_p=chosen.top_p,
                top_k=chosen.top_k,
                device=self.model.device,
            )
        ]


@contextmanager
def _only_special_tokens(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's generation config from `generate`, which takes everything from there that it is not given.

    Many models have a top-k, a repetition penalty or a minimum length there. None of them is part of `Decoding`.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, bos_token_id=own.bos_token_id)
    try:
        yield
    finally:
        model.generation_config = own


class _HeldBytes:
    """Measures the bytes of keys and values that a cache holds for each of its rows, after every token."""

    def __init__(self, cache: Cache, rows: int):
        self.cache, self.rows = cache, rows
        self.peak, self.total, self.count = 0, 0, 0

    def measure(self) -> None:
        held = kv_nbytes(self.cache) // self.rows
        self.peak, self.total, self.count = max(self.peak, held), self.total + held, self.count + 1

    @property
    def mean(self) -> float:
        return self.total / self.count


class _RowEnds(StoppingCriteria):
    """A stopping criterion that never stops, and reports each row that has just generated its end token."""

    def __init__(
        self,
        end: int | list[int] | None,
        device: torch.device,
        prompt_length: int,
        finish: Callable[[int, torch.Tensor, bool], None],
        on_token: Callable[[int], None],
    ):
        self.end = torch.tensor([] if end is None else end, device=device).flatten()
        self.prompt_length, self.finish, self.on_token = prompt_length, finish, on_token
        self.ended: set[int] = set()

    def __call__(self, input_ids: torch.LongTensor, scores: object, **kwargs: object) -> torch.BoolTensor:
        """Called by `generate` after each token. `input_ids`: `[rows, tokens]`."""
        self.on_token(input_ids.shape[1] - self.prompt_length)
        for place in torch.isin(input_ids[:, -1], self.end).nonzero().flatten().tolist():
            if place not in self.ended:
                self.ended.add(place)
                self.finish(place, input_ids[place, self.prompt_length :], False)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]
