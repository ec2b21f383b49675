"""Problems with chains of thought, from a JSONL file, as texts and as token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ..eval import textfiles


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRACES = "traces"
"""The name of the twelve traces in this package."""
FIELDS = ("problem", "reasoning")


@dataclass(frozen=True)
class Text:
    """A problem, and a chain of thought that solves it. The problem is the prompt."""

    problem: str
    reasoning: str


def load_texts(path: Path | str = TRACES, limit: int | None = None) -> list[Text]:
    """Read a JSONL file. Each line is an object with the texts `problem` and `reasoning`; other fields are ignored.

    Args:
        path: the file, or `"traces"` for the twelve chains of thought of nine models that this package contains.
        limit: read only the first lines.

    Raises:
        ValueError: the file does not exist, is damaged or empty, or a line lacks a text. The message names the line.
    """
    file = Path(str(files(__package__) / "traces.jsonl")) if path == TRACES else Path(path)
    if not file.is_file():
        raise ValueError(f"data={str(path)!r} does not exist: give a JSONL file, or {TRACES!r}.")
    if fault := textfiles.fault(file) if file.suffix == ".jsonl" else "its name does not end in .jsonl":
        raise ValueError(f"data={str(path)!r} cannot be read ({fault}): give a JSONL file in UTF-8.")
    texts: list[Text] = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip() or (limit is not None and len(texts) == limit):
            continue
        found = json.loads(line)
        for field in FIELDS:
            if not isinstance(found.get(field), str) or not found[field].strip():
                raise ValueError(
                    f"data={str(path)!r} has no text {field!r} in line {number}: add it, or drop the line."
                )
        texts.append(Text(*(found[field] for field in FIELDS)))
    return texts


@dataclass(frozen=True)
class Ids:
    """Token ids of a text: the prompt (the problem, and an empty line) and the chain (the reasoning)."""

    prompt: tuple[int, ...]
    chain: tuple[int, ...]


def token_ids(text: Text, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Encode a text. The prompt has the special tokens that the tokenizer puts in front of a text, such as `<bos>`.

    Raises:
        ValueError: the tokenizer does not know a word.
    """
    try:
        whole = tokenizer(text.problem + "\n\n")["input_ids"]
        bare, chain = tokenizer([text.problem + "\n\n", text.reasoning], add_special_tokens=False)["input_ids"]
    except Exception as error:  # tokenizers raises plain exceptions
        raise ValueError(
            f"The model's tokenizer cannot read the data ({error}): use a model that knows these words."
        ) from error
    # A tokenizer may also put a special token behind a text. No chain would follow such a token.
    front = next(start for start in range(len(whole) + 1) if whole[start : start + len(bare)] == bare)
    return Ids(tuple(whole[: front + len(bare)]), tuple(chain))


def long_enough(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[tuple[int, Ids]]:
    """The texts whose chain has at least `tokens` tokens: index and token ids, with the chain cut to `tokens`.

    Raises:
        ValueError: no chain is that long.
    """
    found = [token_ids(text, tokenizer) for text in texts]
    long = [(index, Ids(ids.prompt, ids.chain[:tokens])) for index, ids in enumerate(found) if len(ids.chain) >= tokens]
    if not long:
        most = max((len(ids.chain) for ids in found), default=0)
        raise ValueError(f"tokens={tokens} is more than the longest of {len(texts)} chains has: give at most {most}.")
    return long
