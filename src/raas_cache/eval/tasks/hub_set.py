"""An entry of the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .task import Task


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hub.

    Args:
        path: its `org/name`.
        task: makes a task of the name, the rows and this entry.
        question: the question column of problems with a mathematical answer. None to look for usual names.
        split, name: arguments of `datasets.load_dataset`.
        files: JSONL files to read instead, if the repository cannot be loaded by its name.
        max_new_tokens: default limit of generated tokens.
        runs_code: whether marks run code that the model writes.
    """

    path: str
    task: Callable[[str, Any, HubSet], Task]
    question: str | None = None
    split: str = "test"
    name: str | None = None
    files: tuple[str, ...] = ()
    max_new_tokens: int = 32_768
    runs_code: bool = False
