"""Statistics of results by problem: intervals of a share and of a paired difference, and the sign test.

Several samples, or several texts, of one problem are not independent. All functions therefore treat a problem, with
everything that belongs to it, as one observation (a cluster).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .extras import require


RESAMPLES = 10_000
BLOCK = 1 << 24
"""Largest number of problems, counted over all resamples, that the bootstrap draws at once."""
_Z = 1.959964


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences between two settings.

    Args:
        mean: mean over all pairs.
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

    @property
    def p_text(self) -> str:
        """The p-value for a table, with three digits."""
        return f"p = {self.p:.3f}" if self.p >= 0.001 else "p < 0.001"

    def __str__(self) -> str:
        mean, low, high = (round(value, 4) + 0.0 for value in (self.mean, self.low, self.high))  # no -0.0000
        return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"

    def percent(self) -> str:
        """The difference of two shares for a table, in percentage points."""
        mean, low, high = (round(100 * value, 1) + 0.0 for value in (self.mean, self.low, self.high))
        return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def difference(values: Sequence[float], problems: Sequence[Hashable]) -> Difference:
    """Summarize paired differences.

    The interval is an expanded percentile bootstrap (Hesterberg, The American Statistician, 2015): it draws problems
    with replacement, each with all of its values. The plain percentile interval is too narrow for few problems,
    because it has the width of a normal interval with the variance divided by n instead of n - 1. The expanded interval
    takes quantiles further out, so that it has the width of a t-interval. With one problem, it is infinite.

    Args:
        values: one difference per pair.
        problems: the problem of each pair.

    Raises:
        ImportError: scipy is missing.
    """
    mean = sum(values) / len(values)
    return Difference(mean, *_bootstrap(values, problems), sign_test(_by_problem(values, problems)))


def sign_test(values: Sequence[float]) -> float:
    """The two-sided p-value of the exact sign test: how likely so unequal signs are if both are equally likely."""
    above, below = sum(value > 0 for value in values), sum(value < 0 for value in values)
    total, fewer = above + below, min(above, below)
    tail: float = sum(math.comb(total, count) for count in range(fewer + 1)) / 2**total
    return min(1.0, 2 * tail)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of independent trials."""
    return _wilson(successes / trials, trials, _Z)


def clustered_interval(tallies: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """The 95 % interval of a share, when several samples belong to each problem.

    It is the Wilson interval of the mean share with the effective number of independent samples, and the t-quantile of
    the number of problems (Korn and Graubard, Survey Methodology, 1998; Dean and Pagano, Journal of Survey Statistics
    and Methodology, 2015). The effective number is the one that gives the variance between the problems' shares. It
    lies between the number of problems and the number of samples. If all samples of all problems agree, it is the
    number of problems. With one sample per problem, the result is `wilson_interval`.

    Args:
        tallies: number of samples and number of successes of each problem.

    Raises:
        ImportError: scipy is missing.
    """
    problems, samples = len(tallies), sum(count for count, _ in tallies)
    if samples == problems:
        return wilson_interval(sum(successes for _, successes in tallies), problems)
    if problems == 1:
        return 0.0, 1.0
    shares = np.array([successes / count for count, successes in tallies])  # [problems]
    mean = float(shares.mean())
    spread, of_mean = mean * (1 - mean), float(shares.var(ddof=1)) / problems
    effective = float(problems)
    if spread > 0:
        effective = min(max(spread / of_mean, problems), samples) if of_mean > 0 else samples
    return _wilson(mean, effective, _t_quantile(problems))


def _wilson(share: float, trials: float, z: float) -> tuple[float, float]:
    middle = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, (middle - spread) / (1 + z * z / trials)), min(1.0, (middle + spread) / (1 + z * z / trials))


def _t_quantile(problems: int) -> float:
    """The 97.5 % quantile of Student's t with one degree of freedom less than there are problems."""
    require("scipy", "Intervals by problem need scipy", "eval")
    from scipy import stats

    return float(stats.t.ppf(0.975, problems - 1))


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
    size = len(sums)
    if size == 1:
        return -math.inf, math.inf
    rng, means = np.random.default_rng(0), []
    block = max(1, BLOCK // size)
    for start in range(0, RESAMPLES, block):
        drawn = rng.integers(size, size=(min(block, RESAMPLES - start), size))  # [resamples, problems]
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))  # [resamples]
    tail = NormalDist().cdf(-math.sqrt(size / (size - 1)) * _t_quantile(size))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
