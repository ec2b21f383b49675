"""Results of several samples of one problem: pass@k, and the vote of the majority (maj@k)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import comb

from . import answers
from .rows import Row


def pass_at(k: int, samples: int, correct: int) -> float:
    """The unbiased estimate of pass@k for one problem (Chen et al., 2021, arXiv 2107.03374).

    It is the probability that at least one of `k` samples is correct, if they are drawn without replacement.

    Args:
        samples, correct: number of samples of the problem, and number of correct samples.
    """
    return 1 - comb(samples - correct, k) / comb(samples, k)


def majority(rows: Sequence[Row]) -> float:
    """Whether the most frequent answer to a problem is correct: 1 or 0, or the share of correct answers in a tie.

    Correct samples vote for one answer. Wrong samples vote for the same answer if `answers.are_equivalent` says so. A
    sample without an answer does not vote. Without any vote, the result is 0.

    Args:
        rows: the samples of one problem with one setting.

    Raises:
        ImportError: math-verify is needed and missing.
    """
    right = sum(row.correct for row in rows)
    wrong: dict[str, int] = {}  # answer -> votes
    for row in rows:
        if not row.correct and row.answer is not None:
            wrong[row.answer] = wrong.get(row.answer, 0) + 1
    # Comparisons by math-verify are slow, and most problems do not need them.
    if not right or max(wrong.values(), default=0) > right:
        return 0.0
    if sum(wrong.values()) < right:
        return 1.0
    votes: dict[str, int] = {}
    for answer, count in wrong.items():
        same = next((other for other in votes if _are_equivalent(answer, other)), answer)
        votes[same] = votes.get(same, 0) + count
    most = max(votes.values())
    return float(right > most) if right != most else 1 / (1 + list(votes.values()).count(most))


@lru_cache(maxsize=100_000)
def _are_equivalent(answer: str, other: str) -> bool:
    return answers.are_equivalent(answer, other)
