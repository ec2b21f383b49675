"""Measure how many facts of a probe a model recalls with each cache, see `probe`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..eval import inputs
from ..eval.settings import Setting
from ..eval.tasks import hash_of
from ..fidelity import reading as side_by_side
from ..fidelity.batches import pad_token, run
from . import reading, stories, words
from . import tokens as token_places
from .reading import RecallReading, read_recalls
from .results import ProbeRow, Recalls
from .stories import PROBES
from .tokens import ProbeSource, probe_sources


def probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    settings: Sequence[Setting],
    *,
    tokens: int = 1024,
    texts: int = 16,
    seed: int = 0,
    batch_size: int = 1,
    out: Path | str | None = None,
    about: dict[str, Any] | None = None,
) -> Recalls:
    """Measure how many facts a model recalls with each cache, in texts in plain English.

    The model reads the texts token by token, as if it had generated them; nothing is sampled. The prompt is one
    sentence, so nearly all tokens can be evicted. A recall is a place where the text gives the value of an earlier fact
    again. It is correct if the value is the most likely of all values of the probe. Recalls in the second half of a
    text count.

    - `"lemma-once"`: a chain derives lemmas ("So the apple is 8."), and recalls each of them once at most.
    - `"lemma-restated"`: the same chain, but it uses six lemmas at a time, and restates them at each use. The last use
      is near, the derivation is far.
    - `"needle"`: prose in which 24 people have a number of the same things. It asks for all numbers at the end.

    Under `torchrun`, each process calls this function and runs its share of the batches.

    Args:
        name: one of the names above.
        settings: the caches, see `raas_cache.eval.settings`. `dynamic` is always measured.
        tokens: number of tokens of each text, without the prompt.
        texts: number of texts.
        seed: seed of the texts. Equal seeds and tokenizers give equal texts.
        batch_size: largest number of texts in a batch. A batch holds one cache per setting.
        out: folder for the rows; None stores nothing. Rows that the folder already contains are not run again. Only one
            run at a time can use a folder.
        about: other values that the rows depend on, such as the name of the model. All rows in a folder must have equal
            values.

    Raises:
        ValueError: the name is unknown, a number is out of range, the tokenizer cannot encode the texts, or `out`
            contains rows of another model or other texts, is used by another run, or cannot be written to.
        ImportError: accelerate is missing.

    Example:

    ```python
    >>> model, tokenizer = pretrained("smollm2")
    >>> settings = raas_cache.eval.settings([("raas", {}), ("window", {})], [256])
    >>> found = probe(model, tokenizer, "lemma-once", settings)
    >>> print(found.table(against="window"))
    ```
    """
    check_name(name)
    for argument, value in (("tokens", tokens), ("texts", texts)):
        if value < 1:
            raise ValueError(f"{argument}={value} must be at least 1.")
    sources = probe_sources(name, tokenizer, tokens, texts, seed)
    pad = pad_token(tokenizer)

    def read(
        batch: list[ProbeSource], wanted: list[Setting], on_token: Callable[[], object]
    ) -> list[list[RecallReading]]:
        return read_recalls(model, batch, wanted, pad, on_token)

    def depends_on() -> dict[str, Any]:
        files = (side_by_side, reading, stories, token_places, words)
        code = hash_of("".join(inspect.getsource(file) for file in files))
        texts_of = {"probe": name, "tokens": tokens, "seed": seed}
        return {**texts_of, "reading": code, **inputs.of_model(model, tokenizer), **(about or {})}

    rows = run(sources, settings, ProbeRow, read, _row, batch_size=batch_size, out=out, depends_on=depends_on)
    return Recalls(name, rows)


def check_name(name: str) -> None:
    """Raise a ValueError if there is no such probe."""
    if name not in PROBES:
        raise ValueError(f"probe={name!r} is unknown: use one of {', '.join(PROBES)}.")


def _row(source: ProbeSource, setting: Setting, found: RecallReading) -> ProbeRow:
    return ProbeRow(
        index=source.index,
        text_hash=source.text_hash,
        method=setting.method,
        budget=setting.budget,
        options=dict(setting.options),
        prompt_tokens=len(source.ids.prompt),
        tokens=len(source.ids.chain),
        over_budget=found.over_budget,
        kv_bytes=found.kv_bytes,
        since_use=[recall.since_use for recall in source.recalls],
        since_derivation=[recall.since_derivation for recall in source.recalls],
        correct=[int(one) for one in found.correct],
        # Seven digits are more than float32 has. A loss of 0 may be computed as a negative number.
        loss=[float(f"{max(one, 0.0):.7g}") for one in found.loss],
    )
