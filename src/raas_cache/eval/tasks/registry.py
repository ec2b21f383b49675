"""The registry of named data sets: where each is on the Hub, and how a task is made of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .maths import maths_task
from .multiple_choice import multiple_choice_task
from .programs import programs_task
from .task import Task


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hub.

    Args:
        path: its `org/name`.
        question: the question column of problems with a mathematical answer. None to look for usual names.
        split, name: arguments of `datasets.load_dataset`.
        files: JSONL files to read instead, if the repository cannot be loaded by its name.
        max_new_tokens: default limit of generated tokens.
        task: makes a task of the name, the rows and this entry.
        runs_code: whether marks run code that the model writes.
    """

    path: str
    question: str | None = None
    split: str = "test"
    name: str | None = None
    files: tuple[str, ...] = ()
    max_new_tokens: int = 32_768
    task: Callable[[str, Any, HubSet], Task] = maths_task
    runs_code: bool = False


HUB_SETS = {
    "gsm8k": HubSet("openai/gsm8k", "question", name="main", max_new_tokens=4096),
    "math500": HubSet("HuggingFaceH4/MATH-500", "problem"),
    "aime24": HubSet("HuggingFaceH4/aime_2024", "problem", split="train"),
    "aime25": HubSet("math-ai/aime25", "problem"),
    "aime26": HubSet("MathArena/aime_2026", "problem", split="train"),
    "hmmt25": HubSet("MathArena/hmmt_feb_2025", "problem", split="train"),
    "amc23": HubSet("math-ai/amc23", "question"),
    "gpqa-diamond": HubSet("Idavidrein/gpqa", name="gpqa_diamond", split="train", task=multiple_choice_task),
    # The repository has a loading script, which `datasets` no longer runs. The six files are release_v6.
    "livecodebench": HubSet(
        "livecodebench/code_generation_lite",
        files=("test.jsonl", *(f"test{part}.jsonl" for part in range(2, 7))),
        task=programs_task,
        runs_code=True,
    ),
}
