"""Intervals and the sign test, against values computed by hand."""

import itertools
from math import comb

import numpy as np
import pytest

from raas_cache.common import statistics
from raas_cache.common.statistics import Difference, clustered_interval, difference, sign_test, wilson_interval


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


def test_interval_is_as_wide_as_a_t_interval():
    """The plain percentile interval of 12 problems would be 15 % narrower."""
    from scipy import stats

    values = np.random.default_rng(2).normal(0.5, 1.0, 12).tolist()
    found = difference(values, range(12))
    error = np.std(values, ddof=1) / np.sqrt(12)
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, 11) * error, rel=0.05)


def test_one_problem_says_nothing():
    found = difference([1.0, 1.0], "aa")
    assert (found.low, found.high) == (-np.inf, np.inf) and not found.is_significant
    assert str(found) == "+1.0000 (-inf to +inf)" and found.percent() == "+100.0 (-inf to +inf)"


def test_draws_in_blocks(monkeypatch):
    values = np.random.default_rng(3).normal(size=50).tolist()
    whole = difference(values, range(50))
    monkeypatch.setattr(statistics, "BLOCK", 50 * 7)
    blocks = difference(values, range(50))
    assert (blocks.low, blocks.high) == pytest.approx((whole.low, whole.high), abs=0.02)


def test_texts_of_differences():
    found = Difference(0.0834, -0.00001, 0.2, 0.0004)
    assert found.percent() == "+8.3 (+0.0 to +20.0)" and found.p_text == "p < 0.001"
    assert Difference(0, 0, 0, 0.25).p_text == "p = 0.250"


def test_wilson_interval():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(81, 100) == pytest.approx((0.7222, 0.8749), abs=1e-4)


class TestClusteredInterval:
    def test_one_sample_each_is_wilson(self):
        assert clustered_interval([(1, 1)] * 81 + [(1, 0)] * 19) == wilson_interval(81, 100)

    def test_samples_that_agree_count_once(self):
        """8 equal samples of a problem say as much as one. t instead of the normal quantile widens a little."""
        low, high = clustered_interval([(8, 8)] * 81 + [(8, 0)] * 19)
        assert (low, high) == pytest.approx(wilson_interval(81, 100), abs=0.002)
        low, high = clustered_interval([(8, 8)] * 100)
        assert high == 1 and low == pytest.approx(wilson_interval(100, 100)[0], abs=0.002)

    def test_independent_samples_count_each(self):
        """Problems of equal difficulty: at most the interval of all samples."""
        low, high = clustered_interval([(8, 4)] * 50)
        assert (low, high) == pytest.approx(wilson_interval(200, 400), abs=0.002)

    def test_problems_count_equally(self):
        low, high = clustered_interval([(1, 1), (9, 0)] * 30)
        assert (low + high) / 2 == pytest.approx(0.5)

    def test_one_problem_says_nothing(self):
        assert clustered_interval([(8, 3)]) == (0.0, 1.0)
