"""The task of the adapter in `examples/word_problem_solver`: word problems with long solutions."""

import inspect
import re

from .. import word_problems
from ..word_problems import Family, WordProblem, coins_of
from .task import Task, hash_of


SPARE_TOKENS = 64
"""Tokens beyond the length of the right solution, after which a row counts as truncated."""


def word_problem_task(sample: list[WordProblem], name: str, family: Family) -> Task:
    """A task of word problems. A row is correct if the coins of every person and the answer are right."""
    people = len(sample[0].coins)
    given = word_problems.GIVEN[family]
    longest = word_problems.TOKENS_PER_PERSON * (people - given) + word_problems.TOKENS_OF_GIVEN * given + SPARE_TOKENS
    source = inspect.getsource(_mark) + inspect.getsource(_answer_of) + inspect.getsource(coins_of)
    prompts, golds = [problem.problem for problem in sample], [problem.solution for problem in sample]
    return Task(name, prompts, golds, longest, None, _mark, f"{name} {hash_of(source)}")


def _mark(output: str, gold: str) -> tuple[str | None, bool]:
    answer = _answer_of(output)
    return answer, answer == _answer_of(gold) and coins_of(output) == coins_of(gold)


def _answer_of(solution: str) -> str | None:
    found = re.search(r"The answer is (\d+)", solution)
    return None if found is None else found[1]
