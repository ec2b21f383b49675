"""Paired differences: their mean, a bootstrap interval by problem, and a sign test."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np


RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences between two settings.

    Args:
        mean: mean over the texts.
        low, high: the 95 % bootstrap interval of the mean.
        p: p-value of the sign test.
    """

    mean: float
    low: float
    high: float
    p: float

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        mean, low, high = (round(value, 4) + 0.0 for value in (self.mean, self.low, self.high))  # no -0.0000
        return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"


def difference(values: Sequence[float], problems: Sequence[Hashable]) -> Difference:
    """Summarize paired differences.

    Texts of the same problem are not independent, so the bootstrap draws problems, each with all of its texts.

    Args:
        values: one difference per text.
        problems: the problem of each text.
    """
    return Difference(
        sum(values) / len(values), *_bootstrap(values, problems), sign_test(_by_problem(values, problems))
    )


def _by_problem(values: Sequence[float], problems: Sequence[Hashable]) -> list[float]:
    """The sum of the differences of each problem."""
    sums: dict[Hashable, float] = dict.fromkeys(problems, 0.0)
    for value, problem in zip(values, problems, strict=True):
        sums[problem] += value
    return list(sums.values())


def _bootstrap(values: Sequence[float], problems: Sequence[Hashable]) -> tuple[float, float]:
    """The 95 % interval of the mean from draws of problems with replacement. Equal values give equal intervals."""
    sums = np.array(_by_problem(values, problems))  # [problems]
    counts = np.array(_by_problem([1.0] * len(problems), problems))  # [problems]
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))  # [resamples, problems]
    means = sums[drawn].sum(1) / counts[drawn].sum(1)  # [resamples]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def sign_test(values: Sequence[float]) -> float:
    """The two-sided p-value of the exact sign test: how likely so unequal signs are if both are equally likely."""
    above, below = sum(value > 0 for value in values), sum(value < 0 for value in values)
    total, fewer = above + below, min(above, below)
    tail: float = sum(comb(total, count) for count in range(fewer + 1)) / 2**total
    return min(1.0, 2 * tail)
