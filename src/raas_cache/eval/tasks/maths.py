"""Problems whose answer is a number or an expression, as in GSM8K, MATH-500, AIME, AMC and HMMT."""

from __future__ import annotations

from typing import Any

from .. import answers
from .columns import texts_of
from .hub_set import HubSet
from .task import Task


QUESTIONS = ("problem", "question", "prompt")
"""Names of the question column to look for, in this order, if the registry does not name it."""
BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
"""The instruction that DeepSeek-R1, Qwen3 and the leaderboards of these competitions use."""


def maths_task(name: str, rows: Any, entry: HubSet) -> Task:
    """A task whose answers math-verify compares. The rows have a question column and `answer`."""
    answers.require_math_verify()
    question = entry.question or QUESTIONS
    pairs = texts_of(name, rows, question, "answer")
    golds = [answers.gold_of(answer) for _, answer in pairs]
    return Task(name, [text for text, _ in pairs], golds, entry.max_new_tokens, BOXED, answers.mark, answers.marker())
