"""Read texts in batches, in one process or several, and store a row per text and setting. A run can be resumed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..eval import folder, inputs
from ..eval.rows import RowFile, RowKey, StoredRow, read_rows_of
from ..eval.runner import prepare, processes
from ..eval.settings import DYNAMIC, Setting
from .texts import Ids


@dataclass(frozen=True)
class Source:
    """A text to read: its index in the data, its ids, and a hash of everything that its rows depend on."""

    index: int
    ids: Ids
    text_hash: str


class TextRow(StoredRow):
    """What the rows of texts have in common: `text_hash` is the hash of their source. See `FidelityRow`."""

    text_hash: str
    tokens: int
    over_budget: bool


AnySource = TypeVar("AnySource", bound=Source)
AnyTextRow = TypeVar("AnyTextRow", bound=TextRow)
AnyReading = TypeVar("AnyReading")


def run(
    sources: Sequence[AnySource],
    settings: Sequence[Setting],
    kind: type[AnyTextRow],
    read: Callable[[list[AnySource], list[Setting], Callable[[], object]], list[list[AnyReading]]],
    row_of: Callable[[AnySource, Setting, AnyReading], AnyTextRow],
    *,
    batch_size: int,
    out: Path | str | None,
    depends_on: Callable[[], dict[str, Any]],
) -> list[AnyTextRow]:
    """Read all texts with all settings, and return the rows: those of `dynamic`, and then those of each setting.

    Under `torchrun`, each process calls this function and runs its share of the batches.

    Args:
        sources: texts whose chains have the same length.
        settings: the caches. `dynamic` is always read.
        kind: the class of the rows.
        read: reads a batch with these settings, and calls its last argument after each token. Returns, for `dynamic`
            and then for each setting, one reading per text.
        row_of: makes the row of a text and a setting from its reading.
        batch_size: largest number of texts in a batch.
        out: folder for the rows; None stores nothing. Rows that the folder already contains are not run again.
        depends_on: computes the values that all rows in a folder depend on.

    Raises:
        ValueError: `batch_size` is less than 1, or `out` contains rows that depend on other values or of other texts,
            is used by another run, or cannot be written to.
        ImportError: accelerate is missing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    state = processes()
    from accelerate.utils import gather_object

    bounded = [setting for setting in settings if setting.method != DYNAMIC]
    order = [(*setting.key, source.index) for setting in (Setting(DYNAMIC), *bounded) for source in sources]
    with ExitStack() as stack:
        rows: list[AnyTextRow] = []
        file = None
        if out is not None:
            out = Path(out)
            prepare(out, _checker(out, depends_on, bounded, sources, kind), state, stack)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* is damaged", UserWarning)  # `prepare` has warned already
                wanted = set(order)
                rows = [row for row in read_rows_of(out, kind) if row.key in wanted]
            state.wait_for_everyone()  # no process may write before all processes have read
            file = RowFile(out, state.process_index)
        done = {row.key for row in rows}
        batches = [batch for batch in _batches(sources, batch_size) if _missing(batch, bounded, done) is not None]
        ours = batches[state.process_index :: state.num_processes]
        new: list[AnyTextRow] = []
        tokens = len(sources[0].ids.chain)
        with tqdm(total=len(ours) * tokens, unit="token", disable=not state.is_main_process) as bar:
            for batch in ours:
                wanted_now = _missing(batch, bounded, done) or []
                readings = read(batch, wanted_now, bar.update)
                for setting, of_setting in zip((Setting(DYNAMIC), *wanted_now), readings, strict=True):
                    for source, reading in zip(batch, of_setting, strict=True):
                        row = row_of(source, setting, reading)
                        if row.key in done:  # a batch runs again if a row of it is missing
                            continue
                        new.append(row)
                        if file is not None:
                            file.append(row)
        found = {row.key: row for row in rows + gather_object(new)}
    return [found[key] for key in order]


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills the left of shorter prompts."""
    candidates: tuple[int | None, ...] = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def _batches(sources: Sequence[AnySource], batch_size: int) -> list[list[AnySource]]:
    """Texts in batches, longest prompts first, so that the prompts of a batch need little padding."""
    ordered = sorted(sources, key=lambda source: -len(source.ids.prompt))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _missing(batch: Sequence[Source], settings: list[Setting], done: set[RowKey]) -> list[Setting] | None:
    """The settings to run for a batch; None if it has all its rows, `dynamic` included."""
    wanted = [one for one in (Setting(DYNAMIC), *settings) if not done.issuperset(_keys(one, batch))]
    return [one for one in wanted if one.method != DYNAMIC] if wanted else None


def _keys(setting: Setting, batch: Sequence[Source]) -> list[RowKey]:
    return [(*setting.key, source.index) for source in batch]


def _checker(
    out: Path,
    depends_on: Callable[[], dict[str, Any]],
    settings: list[Setting],
    sources: Sequence[Source],
    kind: type[AnyTextRow],
) -> Callable[[], None]:
    """A function that checks the rows of a folder, and writes its settings. The main process calls it."""

    def check() -> None:
        known = folder.agree(out, depends_on(), inputs.of_methods(settings))
        hashes = {source.index: source.text_hash for source in sources}
        for row in read_rows_of(out, kind):
            if row.text_hash != hashes.get(row.index, row.text_hash):
                raise ValueError(f"out={str(out)!r} contains row {row.index} with another text: give another folder.")
        folder.write_settings(out, known)

    return check
