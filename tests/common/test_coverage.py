"""The 95 % intervals contain the true value in 95 % of simulated evaluations: problems, with 8 samples of each."""

import numpy as np
import pytest

from raas_cache.common import statistics
from raas_cache.common.statistics import clustered_interval, difference, sign_test


SAMPLES, DRAWS = 8, 2000
DIFFICULTIES = [(0.5, 0.5), (2.0, 0.5), (2.0, 2.0)]
"""Beta distributions of the chance to solve a problem: easy and hard problems, mostly easy, and mixed."""


def simulated(problems, difficulty, seed):
    """Yields the number of correct samples by problem of a model, and of one that solves a fifth less often."""
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS):
        chance = rng.beta(*difficulty, problems)
        yield rng.binomial(SAMPLES, chance), rng.binomial(SAMPLES, 0.8 * chance)


def coverage_of_share(problems, difficulty):
    truth, hits = difficulty[0] / sum(difficulty), 0
    for correct, _ in simulated(problems, difficulty, seed=1):
        low, high = clustered_interval([(SAMPLES, int(count)) for count in correct])
        hits += low <= truth <= high
    return hits / DRAWS


def coverage_of_difference(problems, difficulty):
    truth, hits = 0.2 * difficulty[0] / sum(difficulty), 0
    for ours, theirs in simulated(problems, difficulty, seed=2):
        found = difference(((ours - theirs) / SAMPLES).tolist(), range(problems))
        hits += found.low <= truth <= found.high
    return hits / DRAWS


@pytest.fixture
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_share_of_100_problems(difficulty):
    assert coverage_of_share(100, difficulty) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_difference_on_100_problems(difficulty, fewer_resamples):
    assert coverage_of_difference(100, difficulty) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_30_problems(difficulty, fewer_resamples):
    """As many as in AIME."""
    assert coverage_of_share(30, difficulty) == pytest.approx(0.95, abs=0.015)
    assert coverage_of_difference(30, difficulty) == pytest.approx(0.95, abs=0.015)


def test_rare_successes_on_30_problems():
    """With 4 % of the samples correct, most of them in one or two problems, the interval is too narrow."""
    assert 0.90 < coverage_of_share(30, (0.2, 5.0)) < 0.95


def test_sample_by_sample_would_be_too_narrow():
    """An interval that takes samples for independent trials misses the truth often."""
    truth, hits = 0.5, 0
    for correct, _ in simulated(100, (0.5, 0.5), seed=1):
        low, high = statistics.wilson_interval(int(correct.sum()), 100 * SAMPLES)
        hits += low <= truth <= high
    assert hits / DRAWS < 0.7


@pytest.mark.parametrize("seed", range(20))
def test_sign_test_is_that_of_scipy(seed):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    values = rng.integers(-3, 4 + seed % 3, rng.integers(1, 60))
    above, below = int((values > 0).sum()), int((values < 0).sum())
    expected = stats.binomtest(above, above + below).pvalue if above + below else 1.0
    assert sign_test(values.tolist()) == pytest.approx(expected, rel=1e-9)
