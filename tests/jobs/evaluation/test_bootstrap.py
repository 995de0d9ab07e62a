"""Correlations and confidence intervals against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from alit.reconstruction import first_within
from jobs.evaluation.bootstrap import adaptive_gain, bootstrap_mean, spearman


@given(st.lists(st.integers(0, 5), min_size=3, max_size=30), st.randoms())
def test_spearman_agrees_with_scipy(values, random):
    """The rank correlation equals SciPy's, with ties too."""
    other = values[:]
    random.shuffle(other)
    expected = 0.0 if len(set(values)) == 1 else scipy.stats.spearmanr(values, other).statistic
    assert spearman(values, other) == pytest.approx(expected, abs=1e-9)


def test_bootstrap_mean_agrees_with_scipy(monkeypatch):
    """The bootstrap interval of a mean equals SciPy's percentile interval."""
    differences = np.random.default_rng(1).normal(0.3, 1.0, 400)
    monkeypatch.setattr("jobs.evaluation.bootstrap.CHUNK_CELLS", 1000 * 400)  # in several parts
    found = bootstrap_mean(differences)
    expected = scipy.stats.bootstrap((differences,), np.mean, method="percentile", n_resamples=5000, rng=2)
    assert found.mean == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), abs=0.01)


def test_adaptive_gain_compares_with_interpolated_lengths():
    """The adaptive gain is the error beyond that of fixed lengths interpolated to the same mean."""
    random = np.random.default_rng(5)
    lengths = (16, 32, 48)
    errors = np.sort(random.uniform(0, 0.3, (3, 200)), axis=0)[::-1].astype(np.float32)
    chosen = first_within(errors, 0.15)
    mean = np.asarray(lengths)[chosen].mean()
    own = errors[chosen, np.arange(200)]
    expected = own.mean() - np.interp(mean, lengths, errors.mean(1))
    assert adaptive_gain(errors, lengths, chosen).mean == pytest.approx(expected, abs=1e-6)
    for same in (
        adaptive_gain(errors, lengths, np.full(200, 2)),
        adaptive_gain(errors[:1], lengths[:1], np.zeros(200, int)),
    ):
        assert (same.mean, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-9)


def test_adaptive_gain_interval_agrees_with_resampling():
    """The interval of the gain is that of computing it anew in every bootstrap sample."""
    random = np.random.default_rng(6)
    lengths = (16, 32, 48, 64)
    hard = random.uniform(0.5, 2, 500)
    errors = (hard * np.array([[0.12], [0.10], [0.08], [0.07]]) * random.uniform(0.9, 1.1, (4, 500))).astype(np.float32)
    chosen = first_within(errors, 0.1)
    found = adaptive_gain(errors, lengths, chosen)
    tokens, own = np.asarray(lengths)[chosen], errors[chosen, np.arange(500)]
    again = []
    for _ in range(2000):
        rows = random.integers(500, size=500)
        again.append(own[rows].mean() - np.interp(tokens[rows].mean(), lengths, errors[:, rows].mean(1)))
    low, high = np.percentile(again, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))
