"""Arithmetic over images: rank correlation, intervals from resampling, and what choosing lengths gains.

Shapes: B images, K lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_RESAMPLES, FEWEST_RESAMPLES = 10_000, 1_000
DRAWS = 10**8
"""Of images in all resamples together, beyond which there are fewer of these."""
CELLS = 1 << 22
"""Of the bootstrap's numbers, held at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean over images, and its 95 % interval from resampling the images."""

    mean: float
    low: float
    high: float


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; 0 where one side is constant."""
    ranks = []
    for values in (np.asarray(a), np.asarray(b)):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    if min(rank.std() for rank in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def resampled_means(columns: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means of columns [B, M] over images drawn with replacement, B each time: [R, M], R of 1,000 to 10,000."""
    values, random = columns.astype(np.float64), np.random.default_rng(seed)
    count = len(values)
    resamples = max(FEWEST_RESAMPLES, min(MOST_RESAMPLES, DRAWS // count))
    at_once = max(1, CELLS // count)
    means = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = random.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        means.append(times.astype(np.float64) @ values / count)
    return np.concatenate(means)


def _interval(mean: float, resampled: np.ndarray) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(mean=float(mean), low=float(low), high=float(high))


def bootstrap(differences: np.ndarray) -> Interval:
    """The mean of paired differences [B] and its 95 % percentile interval."""
    return _interval(differences.mean(dtype=np.float64), resampled_means(differences[:, None])[:, 0])


def adaptive_gain(errors: np.ndarray, lengths: Sequence[int], chosen: np.ndarray) -> Interval:
    """The mean error at chosen lengths minus that of one length for all images, at the same mean tokens.

    The latter is interpolated between the mean errors at the two neighbouring lengths. Both the chosen lengths' mean
    and what is interpolated there are those of each resample.

    Args:
        errors: of every image at every length, [K, B].
        lengths: shortest first.
        chosen: the index of each image's length, [B].
    """
    tokens = np.asarray(lengths, np.float64)
    columns = np.column_stack([errors.T, errors[chosen, np.arange(errors.shape[1])], tokens[chosen]]).astype(np.float64)

    def gain(means: np.ndarray) -> np.ndarray:  # [R, K + 2] to [R]
        *fixed, own, mean = means.T
        if len(tokens) == 1:
            return own - fixed[0]
        low = np.clip(np.searchsorted(tokens, mean, side="right") - 1, 0, len(tokens) - 2)
        part = (mean - tokens[low]) / (tokens[low + 1] - tokens[low])
        shorter, longer = (np.take_along_axis(means, index[:, None], axis=1)[:, 0] for index in (low, low + 1))
        return own - shorter - part * (longer - shorter)

    return _interval(gain(columns.mean(axis=0, keepdims=True))[0], gain(resampled_means(columns)))
