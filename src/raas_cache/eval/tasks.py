"""Data sets, loaded by `datasets` from the Hub or from a local file, as prompts and gold answers."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.extras import require
from . import answers, chains, textfiles


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONS = ("problem", "question", "prompt")
"""Names of the question column to look for, in this order, if the registry does not name it."""
BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
CHAIN_LINES = 50
CHAIN_PROBLEMS = 100
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hub: its path, split and question column, and the limit of new tokens."""

    path: str
    question: str | None = None
    split: str = "test"
    name: str | None = None
    max_new_tokens: int = 32_768


HUB_SETS = {
    "gsm8k": HubSet("openai/gsm8k", "question", name="main", max_new_tokens=4096),
    "math500": HubSet("HuggingFaceH4/MATH-500", "problem"),
    "aime24": HubSet("HuggingFaceH4/aime_2024", "problem", split="train"),
    "aime25": HubSet("math-ai/aime25", "problem"),
}
"""The registry of named data sets."""


@dataclass(frozen=True)
class Task:
    """Questions with gold answers, and the functions that build prompts and mark outputs.

    Args:
        name: name of the data set.
        questions, golds: lists of the same length.
        max_new_tokens: default limit of generated tokens.
        instruction: text added to each question. With None, the question itself is the prompt, and no chat template is
            applied.
        mark: (output, gold) -> (the answer found in the output or None, whether it is correct).
        marker: everything that `mark` depends on besides its arguments, such as its version. A resumed run marks rows
            of another marker again. With None, it marks all rows again.
    """

    name: str
    questions: list[str]
    golds: list[str]
    max_new_tokens: int
    instruction: str | None
    mark: Callable[[str, str], tuple[str | None, bool]]
    marker: str | None = None

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The texts that the model receives, including the special tokens of a chat template."""
        if self.instruction is None:
            return self.questions
        asked = [question + self.instruction for question in self.questions]
        if tokenizer.chat_template is None:
            return [text + "\n\n" for text in asked]
        chats = [[{"role": "user", "content": text}] for text in asked]
        rendered: list[str] = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)  # type: ignore[assignment]
        return rendered

    def token_ids(self, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
        """Token ids of the texts from `prompts`. No special tokens are added to texts from a chat template.

        Raises:
            ValueError: the tokenizer does not know a word.
        """
        templated = self.instruction is not None and tokenizer.chat_template is not None
        try:
            ids: list[list[int]] = tokenizer(prompts, add_special_tokens=not templated)["input_ids"]
            return ids
        except Exception as error:  # tokenizers raises plain exceptions
            raise ValueError(
                f"The model's tokenizer cannot read {self.name!r} ({error}): use a model that knows these words; "
                "the embedded model only knows chains."
            ) from error


def load_task(name: str, limit: int | None = None, seed: int = 0) -> Task:
    """Load a data set by name.

    Args:
        name: one of `HUB_SETS`; an `org/name` on the Hub (split `test`); a local `.jsonl`, `.json`, `.csv` or
            `.parquet` file; or `"chains"` for problems of the embedded model with 50 lines (`"chains-20"`: 20 lines).
            A data set needs a column `problem`, `question` or `prompt`, and a column `answer`.
        limit: use only the first rows. For chains, the number of problems (100 by default).
        seed: seed of the chain problems.

    Raises:
        ValueError: the data set or the file does not exist, cannot be loaded, or lacks a column or an answer.
        ImportError: `datasets` or `math-verify` is missing.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1.")
    if chain := re.fullmatch(r"chains(?:-(\d+))?", name):
        return chain_task(chains.problems(limit or CHAIN_PROBLEMS, int(chain[1] or CHAIN_LINES), seed), name)

    is_file = Path(name).suffix in LOADERS
    entry = HUB_SETS.get(name) or (HubSet(name) if "/" in name and not is_file else None)
    if entry is None and not is_file:
        near = difflib.get_close_matches(name, [*HUB_SETS, "chains"], n=1)
        hint = (
            f"did you mean {near[0]!r}?" if near else f"use {', '.join(HUB_SETS)}, chains, org/name, or a .jsonl file."
        )
        raise ValueError(f"dataset={name!r} is not a data set: {hint}")
    if entry is None and not Path(name).is_file():
        raise ValueError(f"dataset={name!r} does not exist: check the path.")
    answers.require_math_verify()
    rows = _load_rows(name, entry)
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    question = _column(name, rows.column_names, (entry.question,) if entry and entry.question else QUESTIONS)
    answer = _column(name, rows.column_names, ("answer",))
    for index, row in enumerate(rows):
        for column in (question, answer):
            if row[column] is None or not str(row[column]).strip():
                raise ValueError(f"dataset={name!r} has an empty {column!r} in row {index}: fill or drop the row.")
    if not len(rows):
        raise ValueError(f"dataset={name!r} has no rows.")
    questions, golds = [str(text) for text in rows[question]], [answers.gold_of(str(value)) for value in rows[answer]]
    longest = entry.max_new_tokens if entry else HubSet.max_new_tokens
    return Task(name, questions, golds, longest, BOXED, answers.mark, answers.marker())


def chain_task(sample: list[chains.ChainProblem], name: str = "chains") -> Task:
    """A task of chain problems. The gold answers are whole chains; a row is correct if every token is correct."""
    prompts, golds = [problem.prompt for problem in sample], [problem.chain for problem in sample]
    # Allow longer chains than necessary: a model that has lost a milestone may not stop.
    longest = chains.completion_length(sample) * 3 // 2
    marker = "chains " + hash_of(inspect.getsource(_mark_chain) + inspect.getsource(chains.answer_of))
    return Task(name, prompts, golds, longest, None, _mark_chain, marker)


def hash_of(text: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _load_rows(name: str, entry: HubSet | None) -> Any:
    require("datasets", "Data sets need datasets", "eval")
    import datasets

    try:
        if entry:
            return datasets.load_dataset(entry.path, entry.name, split=entry.split)
        textfiles.check_encoding(Path(name))  # a parser may find a wrong encoding only when it reads the row
        return datasets.load_dataset(LOADERS[Path(name).suffix], data_files=name, split="train")
    except Exception as error:  # the Hub client and the parsers raise many kinds of errors
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {str(cause).strip()}".partition("\n")[0]
        mend = "use a local file with the same columns instead"
        if not entry:
            reason, mend = textfiles.fault(Path(name)) or reason, "check that the format matches the file name"
        raise ValueError(f"dataset={name!r} cannot be loaded ({reason}): {mend}") from error


def _column(dataset: str, present: list[str], wanted: tuple[str, ...]) -> str:
    found = next((name for name in wanted if name in present), None)
    if found is None:
        raise ValueError(
            f"dataset={dataset!r} has no column {' or '.join(map(repr, wanted))}, only {', '.join(present)}: "
            "rename the right column."
        )
    return found


def _mark_chain(output: str, gold: str) -> tuple[str | None, bool]:
    """A chain is correct if every token is correct. The answer alone is one digit, and guesses are often right."""
    return chains.answer_of(output), output.split() == gold.split()
