"""Measure the fidelity of caches on texts, see `measure`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..eval import inputs
from ..eval.settings import Setting
from ..eval.tasks import hash_of
from . import reading, texts
from .batches import Source, pad_token, run
from .reading import Reading, read_batch
from .results import Fidelity, FidelityRow
from .texts import Text, long_enough


@dataclass(frozen=True)
class _Source(Source):
    """A text whose chain is long enough, and a hash of its problem."""

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
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1.")
    sources = _sources(data, tokenizer, tokens)
    pad = pad_token(tokenizer)

    def read(batch: list[_Source], wanted: list[Setting], on_token: Callable[[], object]) -> list[list[Reading]]:
        return read_batch(model, [source.ids for source in batch], wanted, pad, on_token)

    def depends_on() -> dict[str, Any]:
        code = hash_of(inspect.getsource(reading) + inspect.getsource(texts))
        return {"tokens": tokens, "reading": code, **inputs.of_model(model, tokenizer), **(about or {})}

    rows = run(sources, settings, FidelityRow, read, _row, batch_size=batch_size, out=out, depends_on=depends_on)
    return Fidelity(rows, len(data) - len(sources))


def _sources(data: Sequence[Text], tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[_Source]:
    """The texts whose chains have at least `tokens` tokens, cut to `tokens`."""
    return [
        _Source(index, ids, hash_of(f"{ids.prompt} {ids.chain}"), hash_of(data[index].problem))
        for index, ids in long_enough(data, tokenizer, tokens)
    ]


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
