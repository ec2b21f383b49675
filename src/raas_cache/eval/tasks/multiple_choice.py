r"""Problems with four options, as in GPQA. The answer is a letter."""

from __future__ import annotations

import inspect
import re
from typing import Any

from .columns import texts_of
from .hub_set import HubSet
from .task import Task, hash_of


LETTERS = "ABCD"
COLUMNS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
"""The columns of GPQA."""
PROMPT = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering."
)
"""The prompt of OpenAI's simple-evals, which published results of GPQA use."""
_BOX, _WRAPPING = re.compile(r"\\f?box(?:ed)?"), re.compile(r"\\(?:text\w*|math\w+)?|[*$(){}\[\]`]")
_ANSWER = re.compile(r"\b(?i:answer)(?: is)?\s*:?\s*([A-D])(?![\w'-])")


def multiple_choice_task(name: str, rows: Any, entry: HubSet) -> Task:
    """A task with shuffled options. The order depends on the texts of the problem alone, so every run has the same."""
    questions, golds = [], []
    for texts in texts_of(name, rows, *COLUMNS):
        question, *options = (text.strip() for text in texts)
        # Hashes order the options: as random as a shuffle, and the same for every seed, limit and release of Python.
        hashes = [hash_of(f"{question}\n{option}") for option in options]
        order = sorted(range(len(options)), key=hashes.__getitem__)
        lines = [f"{letter}) {options[place]}" for letter, place in zip(LETTERS, order, strict=True)]
        questions.append("\n\n".join([PROMPT, question, "\n".join(lines)]))
        golds.append(LETTERS[order.index(0)])
    marker = "multiple choice " + hash_of(inspect.getsource(mark) + inspect.getsource(_letters) + _ANSWER.pattern)
    return Task(name, questions, golds, entry.max_new_tokens, "", mark, marker)


def mark(output: str, gold: str) -> tuple[str | None, bool]:
    r"""Find the last `Answer: C` or `\boxed{C}`, after `</think>` if there is one, and compare the letter."""
    _, _, after = output.rpartition("</think>")
    found = _letters(after) or _letters(output)
    return (found[-1], found[-1] == gold) if found else (None, False)


def _letters(text: str) -> list[str]:
    """All letters that a text gives as its answer. LaTeX and Markdown around a letter are removed."""
    letters: list[str] = _ANSWER.findall(_WRAPPING.sub("", _BOX.sub("Answer:", text)))
    return letters
