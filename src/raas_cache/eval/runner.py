"""Works a task out with every setting: on one process or many, in batches, resumable after each row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cache import PagedCache
from ..extras import require
from .decoding import Decoder, Decoding
from .results import Row, RowFile, RowKey, read_rows
from .settings import Setting, common_options
from .tasks import Task


if TYPE_CHECKING:
    from accelerate import PartialState

SETTINGS_FILE = "settings.json"


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

    decoder = Decoder(model, tokenizer, task, decoding or Decoding())
    everything = tuple(range(len(decoder.ids)))
    order = [key for setting in settings for key in _Job(setting, everything).keys]

    rows, file = [], None
    if out is not None:
        out = Path(out)
        of = {
            "task": task.name,
            "seed": decoder.decoding.seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            **{name: decoder.options[name] for name in ("max_new_tokens", "temperature", "top_p")},
            **(about or {}),
        }
        wanted = set(order)
        rows = [row for row in _rows_found(out, of, decoder.hashes) if row.key in wanted]
        state.wait_for_everyone()  # none writes before all have read
        if state.is_main_process:
            _write_settings(out, of)
        state.wait_for_everyone()
        file = RowFile(out, state.process_index)

    done = {row.key for row in rows}
    jobs = [_Job(setting, batch) for setting in settings for batch in _batches(decoder.ids, setting, batch_size)]
    jobs = [job for job in jobs if not done.issuperset(job.keys)]
    # Dealt out one by one: neighbours are of one setting and take about as long.
    mine = jobs[state.process_index :: state.num_processes]
    new: list[Row] = []
    common = common_options(settings)
    missing = sum(key not in done for job in mine for key in job.keys)
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
            decoder.run(job.setting, job.rows, keep, lambda tokens: bar.set_postfix(tokens=tokens, refresh=False))
    found = {row.key: row for row in rows + gather_object(new)}
    return [found[key] for key in order]


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
