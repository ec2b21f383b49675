"""Run a task with every setting, in one process or several, in batches. A run can be resumed after each row."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cache.paged_cache import PagedCache
from ..common.extras import require
from . import folder, inputs
from .decoding import Decoder, Decoding, Place
from .rows import Row, RowFile, RowKey, read_rows
from .settings import Setting, common_options
from .tasks import Task


if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass(frozen=True)
class _Job:
    """One batch: a setting, and the problems and samples in the batch."""

    setting: Setting
    rows: tuple[Place, ...]

    @property
    def keys(self) -> list[RowKey]:
        """The keys of the rows that the batch produces, see `Row.key`."""
        return [(*self.setting.key, *place) for place in self.rows]


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
    """Run the model on a task with every setting.

    Under `accelerate launch`, each process calls this function and runs its share of the batches. The batches are the
    same for any number of processes, and sampled rows have their own random numbers: any number of processes gives the
    same rows. Another batch size also gives the same rows, except for rounding (see `sampling.RowSampler`). The prompts
    of a batch fill the same number of pages, so that bytes and evictions of a batch are also those of each row.

    Args:
        out: folder for the rows; None stores nothing. Each row is written when it ends. Rows that the folder already
            contains are not run again, and rows with other settings stay in the folder. A folder with some samples of
            each problem can get more. Only one run at a time can use
            a folder. If gold answers or the marker have changed, stored rows are marked again, and a warning says how
            many changed. If processes run on several machines, all machines must be able to access the folder.
        batch_size: largest number of rows in a batch.
        decoding: how tokens are chosen, and the number of samples; greedy by default.
        about: other values that the rows depend on, in addition to the values in `inputs.py`, such as the name of the
            model. All rows in a folder must have equal values.

    Returns:
        The rows of these settings, in order of setting, problem and sample, on every process. With `out`, this includes
        rows of earlier runs.

    Raises:
        ValueError: `out` contains rows with another task, model or decoding, is used by another run, or cannot be
            written to; or a number is out of range.
        ImportError: accelerate is missing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    state = processes()
    from accelerate.utils import gather_object

    decoder = Decoder(model, tokenizer, task, decoding or Decoding())
    samples = decoder.decoding.samples
    everything = tuple((index, sample) for index in range(len(decoder.ids)) for sample in range(samples))
    order = [key for setting in settings for key in _Job(setting, everything).keys]
    with ExitStack() as stack:
        rows, file = [], None
        if out is not None:
            out = Path(out)
            folder_of_rows = out

            def check() -> None:
                depends_on = {**inputs.of_run(decoder), **(about or {})}
                folder.prepare(folder_of_rows, depends_on, inputs.of_methods(settings), decoder.task, decoder.hashes)

            prepare(out, check, state, stack)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* is damaged", UserWarning)  # `prepare` has warned already
                wanted = set(order)
                rows = [row for row in read_rows(out) if row.key in wanted]
            state.wait_for_everyone()  # no process may write before all processes have read
            file = RowFile(out, state.process_index)
        done = {row.key for row in rows}
        jobs = [
            _Job(setting, batch)
            for setting in settings
            for batch in _batches(decoder.ids, samples, setting, batch_size)
        ]
        jobs = [job for job in jobs if not done.issuperset(job.keys)]
        # Distribute batches in turn: consecutive batches have the same setting and take about the same time.
        new = _work(decoder, jobs[state.process_index :: state.num_processes], done, file, state, settings)
        found = {row.key: row for row in rows + gather_object(new)}
    return [found[key] for key in order]


def prepare(out: Path, check: Callable[[], None], state: PartialState, stack: ExitStack) -> None:
    """On the main process, lock the folder until `stack` is closed, and call `check`. All processes raise its error."""
    from accelerate.utils import broadcast_object_list

    refusal: list[Exception | None] = [None]
    if state.is_main_process:
        try:
            stack.enter_context(folder.locked(out))
            check()
        except Exception as error:  # the other processes must not wait forever, whatever the error is
            refusal[0] = error
    broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise refusal[0]


def _work(
    decoder: Decoder,
    jobs: list[_Job],
    done: set[RowKey],
    file: RowFile | None,
    state: PartialState,
    settings: list[Setting],
) -> list[Row]:
    """Run batches, and return the rows that were not in the folder."""
    new: list[Row] = []
    common = common_options(settings)
    missing = sum(key not in done for job in jobs for key in job.keys)
    with tqdm(total=missing, unit="row", disable=not state.is_main_process) as bar:

        def keep(row: Row) -> None:
            if row.key in done:  # the batch ran again because other rows of it were missing
                return
            if file:
                file.append(row)
            new.append(row)
            bar.update()

        for job in jobs:
            budget = "" if job.setting.budget is None else f" @ {job.setting.budget}"
            numbers = ", ".join(dict.fromkeys(str(index) for index, _ in job.rows))
            bar.set_description(f"{job.setting.label_but(common)}{budget}, problems {numbers}"[:48])
            decoder.run(job.setting, job.rows, keep, lambda tokens: bar.set_postfix(tokens=tokens, refresh=False))
    return new


def processes() -> PartialState:
    """The state of this process: its rank among the processes of `accelerate launch` or `torchrun`, and its device.

    Raises:
        ImportError: accelerate is missing.
    """
    require("accelerate", "Evaluation needs accelerate", "eval")
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Without a GPU, accelerate only finds the other processes if `cpu=True`.
    on_cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    # The first process to finish waits until the longest chain has ended.
    return PartialState(cpu=on_cpu, timeout=timedelta(days=30))


def _batches(ids: list[list[int]], samples: int, setting: Setting, batch_size: int) -> list[tuple[Place, ...]]:
    """Group the rows into batches, longest prompts first. Returns problem and sample of each row of each batch.

    All problems get their first sample before the second one: the first batches of a run with more samples are those of
    a run with fewer samples.
    """
    span = span_of(setting)
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(ids):
        groups.setdefault(-(-len(prompt) // span), []).append(index)
    batches = []
    for _, group in sorted(groups.items(), reverse=True):
        places = [(index, sample) for sample in range(samples) for index in group]
        batches += [tuple(places[start : start + batch_size]) for start in range(0, len(places), batch_size)]
    return batches


def span_of(setting: Setting) -> int:
    """Tokens per span: prompts that fill the same number of spans can share a padded batch.

    All rows of a batch then hold the same number of pages, so the sizes of the cache are those of each row. The span is
    one page if the prompt is pinned and scores are exact, and one token for other paged caches. For `DynamicCache`
    every span is correct; 16 keeps padding short.
    """
    cache = setting.new_cache()
    if not isinstance(cache, PagedCache):
        return 16
    settings = cache.settings
    pinned = settings.prompt == "pin" and settings.scoring == "exact" and settings.policy.evicts
    return settings.page_size if pinned else 1
