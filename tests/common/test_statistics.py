"""Intervals and the sign test, against values computed by hand."""

import itertools
from math import comb

import numpy as np
import pytest

from raas_cache.common.statistics import difference, sign_test


@pytest.mark.parametrize(
    ("values", "p"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2 / 32),
        ([1.0, 1.0, 1.0, 1.0, -1.0], 2 * (1 + 5) / 32),
        ([1.0, -1.0], 1.0),
        ([0.0, 0.0], 1.0),
        ([0.0, 1.0, 2.0, 3.0], 2 / 8),
    ],
)
def test_sign_test(values, p):
    assert sign_test(values) == pytest.approx(p)
    assert sign_test([-value for value in values]) == pytest.approx(p)


def test_sign_test_is_a_tail_of_the_binomial():
    tail = sum(comb(20, count) for count in range(6)) / 2**20
    assert sign_test([1.0] * 15 + [-1.0] * 5) == pytest.approx(2 * tail)


def test_interval_of_all_draws():
    """With three problems, all 27 draws can be listed. The quantiles of 10,000 draws are among their means."""
    values = [0.0, 3.0, 6.0]
    means = sorted({sum(draw) / 3 for draw in itertools.product(values, repeat=3)})
    found = difference(values, "abc")
    assert found.mean == 3.0
    # P(mean = 0) = 1/27 is above 2.5 %, so both ends are the extremes.
    assert (found.low, found.high) == (means[0], means[-1])
    assert not found.is_significant


def test_problems_are_drawn_with_all_their_texts():
    """Ten texts of one problem are one observation: the interval is that of the problems, and not of the texts."""
    values, problems = [1.0] * 10 + [-1.0] * 10, ["a"] * 10 + ["b"] * 10
    clustered, apart = difference(values, problems), difference(values, range(20))
    assert (clustered.low, clustered.high) == (-1.0, 1.0)
    assert -0.6 < apart.low < 0 < apart.high < 0.6
    assert clustered.mean == apart.mean == 0.0
    assert difference([1.0] * 10, ["a"] * 10).p == 1.0 and difference([1.0] * 10, range(10)).p == pytest.approx(
        2 / 1024
    )


def test_interval_has_the_size_of_the_standard_error():
    values = np.random.default_rng(1).normal(0.5, 1.0, 200).tolist()
    found = difference(values, range(200))
    error = np.std(values) / np.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.is_significant
    assert difference(values, range(200)) == found, "the same draws each time"


def test_zero_has_no_sign():
    assert str(difference([-1e-9, 0.0], "ab")) == "+0.0000 (+0.0000 to +0.0000)"
