"""Works a task out with every setting: on one process or many, in batches, resumable after each row."""

from __future__ import annotations

import warnings
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
from .decoding import Decoder, Decoding
from .results import Row, RowFile, RowKey, read_rows
from .settings import Setting, common_options
from .tasks import Task


if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass(frozen=True)
class _Job:
    """A batch: a setting, and the rows of the task that run together."""

    setting: Setting
    rows: tuple[int, ...]

    @property
    def keys(self) -> list[RowKey]:
        """Those of the rows, see `Row.key`."""
        return [(*self.setting.key, index) for index in self.rows]


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
            settings stay. No two runs share one at a time. Rows whose gold answers have changed since, or that another
            marker marked, are marked again (a warning says how many). Processes on several machines need a folder that
            all of them see. None keeps nothing.
        batch_size: rows that run together, at most.
        decoding: how tokens are chosen; greedy by default.
        about: what else the rows depend on, beyond all that `inputs.py` lists, such as the model's name: a folder takes
            only rows for which it is equal.

    Returns:
        Rows of these settings, in order, on every process; with `out` those of earlier runs too.

    Raises:
        ValueError: `out` holds rows of another task, model or way of decoding, another run is writing there, or it
            cannot be written to; or a number is out of range.
        ImportError: accelerate is missing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    state = processes()
    from accelerate.utils import gather_object

    decoder = Decoder(model, tokenizer, task, decoding or Decoding())
    everything = tuple(range(len(decoder.ids)))
    order = [key for setting in settings for key in _Job(setting, everything).keys]
    with ExitStack() as stack:
        rows, file = [], None
        if out is not None:
            out = Path(out)
            if refusal := _prepare(out, decoder, settings, batch_size, about or {}, state, stack):
                raise refusal
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* is damaged", UserWarning)  # of which `_prepare` has told
                wanted = set(order)
                rows = [row for row in read_rows(out) if row.key in wanted]
            state.wait_for_everyone()  # none writes before all have read
            file = RowFile(out, state.process_index)
        done = {row.key for row in rows}
        jobs = [_Job(setting, batch) for setting in settings for batch in _batches(decoder.ids, setting, batch_size)]
        jobs = [job for job in jobs if not done.issuperset(job.keys)]
        # Dealt out one by one: neighbours are of one setting and take about as long.
        new = _work(decoder, jobs[state.process_index :: state.num_processes], done, file, state, settings)
        found = {row.key: row for row in rows + gather_object(new)}
    return [found[key] for key in order]


def _prepare(
    out: Path,
    decoder: Decoder,
    settings: list[Setting],
    batch_size: int,
    about: dict[str, Any],
    state: PartialState,
    stack: ExitStack,
) -> Exception | None:
    """Have the main process lock the folder until the stack ends, and make it ready.

    Returns:
        On all processes: why it cannot be had, if so.
    """
    from accelerate.utils import broadcast_object_list

    refusal: list[Exception | None] = [None]
    if state.is_main_process:
        try:
            stack.enter_context(folder.locked(out))
            of = {**inputs.of_run(decoder, batch_size), **about}
            folder.prepare(out, of, inputs.of_methods(settings), decoder.task, decoder.hashes)
        except Exception as error:  # whatever it is, the others must not wait for it
            refusal[0] = error
    broadcast_object_list(refusal)
    return refusal[0]


def _work(
    decoder: Decoder,
    jobs: list[_Job],
    done: set[RowKey],
    file: RowFile | None,
    state: PartialState,
    settings: list[Setting],
) -> list[Row]:
    """The rows of some batches that are not done yet."""
    new: list[Row] = []
    common = common_options(settings)
    missing = sum(key not in done for job in jobs for key in job.keys)
    with tqdm(total=missing, unit="row", disable=not state.is_main_process) as bar:

        def keep(row: Row) -> None:
            if row.key in done:  # its batch ran again for the sake of others
                return
            if file:
                file.append(row)
            new.append(row)
            bar.update()

        for job in jobs:
            budget = "" if job.setting.budget is None else f" @ {job.setting.budget}"
            bar.set_description(f"{job.setting.label_but(common)}{budget}, rows {', '.join(map(str, job.rows))}"[:48])
            decoder.run(job.setting, job.rows, keep, lambda tokens: bar.set_postfix(tokens=tokens, refresh=False))
    return new


def processes() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` has started, and its device.

    Raises:
        ImportError: accelerate is missing.
    """
    require("accelerate", "Evaluation needs accelerate", "eval")
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
