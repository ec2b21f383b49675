"""Works a task out with every setting: on one process or many, in batches, resumable after each row."""

from __future__ import annotations

import importlib.util
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..cache import PagedCache
from ..measure import evictions, kv_nbytes
from .results import Row, RowFile, read_rows
from .settings import Setting, common_options
from .tasks import Task, hash_of


if TYPE_CHECKING:
    from accelerate import PartialState

SETTINGS_FILE = "settings.json"
SHORT = 2048
"""New tokens up to which a GPU would not win back what it spends on compiling each setting."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Args:
        max_new_tokens: after which a chain is cut off; None for what the task says.
        temperature: 0 for greedy decoding, where a row's result does not depend on the batch that it is in.
        top_p: share of the probability that is sampled from.
        seed: of sampling, together with the batch: the same with any number of processes.

    Raises:
        ValueError: a number is out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 is greedy.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1].")

    def options(self, task: Task) -> dict[str, Any]:
        """For `generate`."""
        limit = self.max_new_tokens or task.max_new_tokens
        # None where the model's own generation config would have its say.
        chosen = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature:
            chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": limit, "disable_compile": limit <= SHORT, **chosen}


@dataclass(frozen=True)
class _Job:
    """A batch: a setting, and the rows of the task that run together."""

    setting: Setting
    rows: tuple[int, ...]


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: list[Setting],
    *,
    out: Path | str | None = None,
    batch_size: int = 8,
    decoding: Decoding | None = None,
    about: dict[str, Any] | None = None,
) -> list[Row]:
    """Let the model work the task out with every setting.

    Under `accelerate launch` each process calls this and takes its share of the batches, which are the same ones with
    any number of processes. Prompts of a batch differ in length by less than a page, or not at all where padding
    would move page borders: what a row gives is what it gives alone.

    Args:
        out: folder to write each row to as soon as it has ended; rows found there are not run again, those of other
            settings stay. Processes on several machines need a folder that all of them see. None keeps nothing.
        batch_size: rows that run together, at most.
        decoding: how tokens are chosen; greedy by default.
        about: what else the rows depend on, such as the model's name: a folder takes only rows for which it is equal.

    Returns:
        Rows of these settings, in order, on every process; with `out` those of earlier runs too.

    Raises:
        ValueError: `out` holds rows of another task, model or way of decoding; or a number is out of range.
        ImportError: accelerate is missing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    state = processes()
    from accelerate.utils import gather_object

    decoding = decoding or Decoding()
    ids = task.token_ids(tokenizer)
    hashes = [hash_of(prompt) for prompt in task.prompts(tokenizer)]
    options = decoding.options(task)
    order = [(*setting.key, index) for setting in settings for index in range(len(ids))]

    rows, file = [], None
    if out is not None:
        out = Path(out)
        of = {
            "task": task.name,
            "seed": decoding.seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            **{name: options[name] for name in ("max_new_tokens", "temperature", "top_p")},
            **(about or {}),
        }
        rows = [row for row in _rows_found(out, of, hashes) if row.key in set(order)]
        state.wait_for_everyone()  # none writes before all have read
        if state.is_main_process:
            _write_settings(out, of)
        state.wait_for_everyone()
        file = RowFile(out, state.process_index)

    done = {row.key for row in rows}
    jobs = [_Job(setting, batch) for setting in settings for batch in _batches(ids, setting, batch_size)]
    jobs = [job for job in jobs if any((*job.setting.key, index) not in done for index in job.rows)]
    # Dealt out one by one: neighbours are of one setting and take about as long.
    mine = jobs[state.process_index :: state.num_processes]
    new: list[Row] = []
    common = common_options(settings)
    missing = sum((*job.setting.key, index) not in done for job in mine for index in job.rows)
    with tqdm(total=missing, unit="row", disable=not state.is_main_process) as bar:

        def keep(row: Row) -> None:
            if row.key in done:  # its batch ran again for the sake of others
                return
            if file:
                file.append(row)
            new.append(row)
            bar.update()

        for job in mine:
            budget = "" if job.setting.budget is None else f" @ {job.setting.budget}"
            bar.set_description(f"{job.setting.label_but(common)}{budget}, rows {', '.join(map(str, job.rows))}"[:48])
            _run_batch(model, tokenizer, task, job, ids, hashes, options, decoding.seed, keep, bar)
    found = {row.key: row for row in rows + gather_object(new)}
    return [found[key] for key in order]


def processes() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` has started, and its device.

    Raises:
        ImportError: accelerate is missing.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError("Evaluation needs accelerate: pip install raas-cache[eval]")
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Without a GPU, accelerate looks for other processes only if it is told that there is none.
    on_cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    # Whoever is done first waits for the longest chain of all.
    return PartialState(cpu=on_cpu, timeout=timedelta(days=30))


def _batches(ids: list[list[int]], setting: Setting, batch_size: int) -> list[tuple[int, ...]]:
    """Rows of the task that run together, the longest prompts first."""
    span = span_of(setting)
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(ids):
        groups.setdefault(-(-len(prompt) // span), []).append(index)
    return [
        tuple(group[start : start + batch_size])
        for _, group in sorted(groups.items(), reverse=True)
        for start in range(0, len(group), batch_size)
    ]


def span_of(setting: Setting) -> int:
    """Prompts that fill as many spans of so many tokens may be padded to one length, and no page is the wiser."""
    cache = setting.new_cache()
    if not isinstance(cache, PagedCache):
        return 16
    settings = cache.settings
    pinned = settings.prompt == "pin" and settings.scoring == "exact" and settings.policy.evicts
    return settings.page_size if pinned else 1


@torch.no_grad()
def _run_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    job: _Job,
    ids: list[list[int]],
    hashes: list[str],
    options: dict[str, Any],
    seed: int,
    keep: Callable[[Row], None],
    bar: tqdm,
) -> None:
    """Generate a batch, and hand each row to `keep` when it has ended."""
    cache = job.setting.new_cache(model.config.get_text_config(decoder=True))
    prompt_length = max(len(ids[index]) for index in job.rows)
    padding = [prompt_length - len(ids[index]) for index in job.rows]
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    inputs = {
        "input_ids": [[pad] * empty + ids[index] for empty, index in zip(padding, job.rows, strict=True)],
        "attention_mask": [[0] * empty + [1] * (prompt_length - empty) for empty in padding],
    }
    inputs = {name: torch.tensor(value, device=model.device) for name, value in inputs.items()}
    torch.manual_seed(seed * 1_000_003 + job.rows[0])  # of which the CPU takes 32 bits
    started = time.perf_counter()

    def finish(place: int, new: torch.Tensor, truncated: bool) -> None:
        index = job.rows[place]
        output = tokenizer.decode(new, skip_special_tokens=True)
        answer, correct = task.mark(output, task.golds[index])
        keep(
            Row(
                index=index,
                prompt_hash=hashes[index],
                method=job.setting.method,
                budget=job.setting.budget,
                options=dict(job.setting.options),
                output=output,
                answer=answer,
                gold=task.golds[index],
                correct=correct,
                prompt_tokens=len(ids[index]),
                tokens=len(new),
                truncated=truncated,
                over_budget=isinstance(cache, PagedCache) and cache.is_over_budget,
                seconds=time.perf_counter() - started,
                batch=job.rows[0],
                kv_bytes=kv_nbytes(cache) // len(job.rows),
                evictions=evictions(cache),
            )
        )

    watch = _RowEnds(model, prompt_length, finish, bar)
    with warnings.catch_warnings():
        # A prompt over the budget is marked in its row.
        warnings.filterwarnings("ignore", "budget=.* leaves", UserWarning)
        criteria = StoppingCriteriaList([watch])
        options = {"pad_token_id": pad, **options}
        sequences = model.generate(**inputs, past_key_values=cache, stopping_criteria=criteria, **options)
    for place in range(len(job.rows)):
        if place not in watch.ended:
            finish(place, sequences[place, prompt_length:], truncated=True)


class _RowEnds(StoppingCriteria):
    """Stops nothing; tells of each row that has just written its end token."""

    def __init__(self, model: PreTrainedModel, prompt_length: int, finish: Callable, bar: tqdm):
        end = model.generation_config.eos_token_id
        self.end = torch.tensor([] if end is None else end, device=model.device).flatten()
        self.prompt_length, self.finish, self.bar = prompt_length, finish, bar
        self.ended: set[int] = set()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        """Called by `generate` after each token."""
        for place in torch.isin(input_ids[:, -1], self.end).nonzero().flatten().tolist():
            if place not in self.ended:
                self.ended.add(place)
                self.finish(place, input_ids[place, self.prompt_length :], truncated=False)
        self.bar.set_postfix(tokens=input_ids.shape[1] - self.prompt_length, refresh=False)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _rows_found(out: Path, of: dict[str, Any], hashes: list[str]) -> list[Row]:
    """Rows of earlier runs; a folder whose rows were made in another way is refused."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file: give a folder.")
    path = out / SETTINGS_FILE
    for name, value in json.loads(path.read_text()).items() if path.exists() else ():
        if name in of and of[name] != value:
            raise ValueError(
                f"out={str(out)!r} holds rows with {name}={value!r}, this run has {of[name]!r}: give another folder."
            )
    rows = read_rows(out)
    for row in rows:
        if row.index < len(hashes) and row.prompt_hash != hashes[row.index]:
            raise ValueError(f"out={str(out)!r} has row {row.index} of another prompt: give another folder.")
    return rows


def _write_settings(out: Path, of: dict[str, Any]) -> None:
    """In one piece: a run that is killed meanwhile leaves the file or none."""
    out.mkdir(parents=True, exist_ok=True)
    whole = out / f"{SETTINGS_FILE}.new"
    whole.write_text(json.dumps(of, indent=1) + "\n")
    whole.replace(out / SETTINGS_FILE)
