"""Measure the fidelity of caches on texts, in one process or several. A run can be resumed after each batch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..eval import folder, inputs
from ..eval.rows import RowFile, RowKey, read_rows_of
from ..eval.runner import prepare, processes
from ..eval.settings import DYNAMIC, Setting
from ..eval.tasks import hash_of
from . import reading, texts
from .reading import Reading, read_batch
from .results import Fidelity, FidelityRow
from .texts import Ids, Text, long_enough


@dataclass(frozen=True)
class _Source:
    """A text whose chain is long enough: its index in the data, its ids, and hashes."""

    index: int
    ids: Ids
    text_hash: str
    problem_hash: str


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[Text],
    settings: Sequence[Setting],
    *,
    tokens: int,
    batch_size: int = 1,
    out: Path | str | None = None,
    about: dict[str, Any] | None = None,
) -> Fidelity:
    """Measure how much each cache changes what a model predicts on given texts.

    The model reads each problem as the prompt, and then the chain of thought token by token, as if it had generated the
    chain. Each token gives the loss, KL(dynamic || method) of the predictions, and whether the most likely token is
    that of `DynamicCache`.

    Under `torchrun`, each process calls this function and runs its share of the batches.

    Args:
        data: problems with chains of thought, see `load_texts`.
        settings: the caches, see `raas_cache.eval.settings`. `dynamic` is always measured.
        tokens: number of tokens to read of each chain. Shorter chains are left out.
        batch_size: largest number of texts in a batch. A batch holds one cache per setting.
        out: folder for the rows; None stores nothing. Rows that the folder already contains are not run again. Only one
            run at a time can use a folder.
        about: other values that the rows depend on, such as the name of the model. All rows in a folder must have equal
            values.

    Raises:
        ValueError: no chain is long enough, the tokenizer does not know a word, a number is out of range, or `out`
            contains rows of another model or other texts, is used by another run, or cannot be written to.
        ImportError: accelerate is missing.

    Example:

    ```python
    >>> model, tokenizer = pretrained("smollm2")
    >>> settings = raas_cache.eval.settings([("raas", {}), ("window", {})], [256])
    >>> found = measure(model, tokenizer, load_texts(), settings, tokens=1024)
    >>> print(found.table(against="window"))
    ```
    """
    for name, value in (("tokens", tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    state = processes()
    from accelerate.utils import gather_object

    sources = _sources(data, tokenizer, tokens)
    bounded = [setting for setting in settings if setting.method != DYNAMIC]
    order = [(*setting.key, source.index) for setting in (Setting(DYNAMIC), *bounded) for source in sources]
    with ExitStack() as stack:
        rows: list[FidelityRow] = []
        file = None
        if out is not None:
            out = Path(out)
            prepare(out, _checker(out, model, tokenizer, tokens, about or {}, bounded, sources), state, stack)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* is damaged", UserWarning)  # `prepare` has warned already
                wanted = set(order)
                rows = [row for row in read_rows_of(out, FidelityRow) if row.key in wanted]
            state.wait_for_everyone()  # no process may write before all processes have read
            file = RowFile(out, state.process_index)
        done = {row.key for row in rows}
        batches = [batch for batch in _batches(sources, batch_size) if _missing(batch, bounded, done) is not None]
        ours = batches[state.process_index :: state.num_processes]
        new = _work(model, tokenizer, ours, bounded, done, file, tokens, state.is_main_process)
        found = {row.key: row for row in rows + gather_object(new)}
    return Fidelity([found[key] for key in order], len(data) - len(sources))


def _sources(data: Sequence[Text], tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[_Source]:
    """The texts whose chains have at least `tokens` tokens, cut to `tokens`."""
    return [
        _Source(index, ids, hash_of(f"{ids.prompt} {ids.chain}"), hash_of(data[index].problem))
        for index, ids in long_enough(data, tokenizer, tokens)
    ]


def _batches(sources: list[_Source], batch_size: int) -> list[list[_Source]]:
    """Texts in batches, longest prompts first, so that the prompts of a batch need little padding."""
    ordered = sorted(sources, key=lambda source: -len(source.ids.prompt))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _missing(batch: list[_Source], settings: list[Setting], done: set[RowKey]) -> list[Setting] | None:
    """The settings to run for a batch; None if it has all its rows, `dynamic` included."""
    wanted = [one for one in (Setting(DYNAMIC), *settings) if not done.issuperset(_keys(one, batch))]
    return [one for one in wanted if one.method != DYNAMIC] if wanted else None


def _keys(setting: Setting, batch: list[_Source]) -> list[RowKey]:
    return [(*setting.key, source.index) for source in batch]


def _checker(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    about: dict[str, Any],
    settings: list[Setting],
    sources: list[_Source],
) -> Callable[[], None]:
    """A function that checks the rows of a folder, and writes its settings. The main process calls it."""

    def check() -> None:
        code = hash_of(inspect.getsource(reading) + inspect.getsource(texts))
        depends_on = {"tokens": tokens, "reading": code, **inputs.of_model(model, tokenizer), **about}
        known = folder.agree(out, depends_on, inputs.of_methods(settings))
        hashes = {source.index: source.text_hash for source in sources}
        for row in read_rows_of(out, FidelityRow):
            if row.text_hash != hashes.get(row.index, row.text_hash):
                raise ValueError(f"out={str(out)!r} contains row {row.index} with another text: give another folder.")
        folder.write_settings(out, known)

    return check


def _work(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: list[list[_Source]],
    settings: list[Setting],
    done: set[RowKey],
    file: RowFile | None,
    tokens: int,
    shows_progress: bool,
) -> list[FidelityRow]:
    """Run batches, and return the rows that were not in the folder."""
    new: list[FidelityRow] = []
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in pads if token is not None)
    with tqdm(total=len(batches) * tokens, unit="token", disable=not shows_progress) as bar:
        for batch in batches:
            to_run = _missing(batch, settings, done) or []
            readings = read_batch(model, [source.ids for source in batch], to_run, pad, bar.update)
            for setting, of_setting in zip((Setting(DYNAMIC), *to_run), readings, strict=True):
                for source, one in zip(batch, of_setting, strict=True):
                    if (*setting.key, source.index) not in done:  # a batch runs again if a row of it is missing
                        row = _row(source, setting, one)
                        new.append(row)
                        if file is not None:
                            file.append(row)
    return new


def _row(source: _Source, setting: Setting, found: Reading) -> FidelityRow:
    return FidelityRow(
        index=source.index,
        text_hash=source.text_hash,
        problem_hash=source.problem_hash,
        method=setting.method,
        budget=setting.budget,
        options=dict(setting.options),
        prompt_tokens=len(source.ids.prompt),
        tokens=len(source.ids.chain),
        over_budget=found.over_budget,
        kv_bytes=found.kv_bytes,
        # Seven digits are more than float32 has.
        cells=[float(f"{max(value, 0.0):.7g}") for value in found.cells.flatten().tolist()],
    )
