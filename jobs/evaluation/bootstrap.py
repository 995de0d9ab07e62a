"""Statistics over images: rank correlation, bootstrap confidence intervals, and the gain of adaptive lengths.

Shapes: B images, K lengths, M columns, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_RESAMPLES, MAX_RESAMPLES = 1_000, 10_000
MAX_DRAWS = 10**8
"""Limit on the images drawn in all resamples together; with many images there are fewer resamples."""
CHUNK_CELLS = 1 << 22
"""Limit on the numbers of resamples times images that are held in memory at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfidenceInterval:
    """A mean over images with its 95 % bootstrap percentile interval."""

    mean: float
    low: float
    high: float


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Returns Spearman's rank correlation, ties at their mean rank; 0 where one side is constant."""
    ranks = []
    for values in (np.asarray(a), np.asarray(b)):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    if min(rank.std() for rank in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def resampled_means(columns: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns the means of columns over images that are resampled with replacement.

    Args:
        columns: One row per image, [B, M].
        seed: Seed of the random generator.

    Returns:
        One row per resample of B images, [R, M]; R lies between 1,000 and 10,000.
    """
    values, random = columns.astype(np.float64), np.random.default_rng(seed)
    count = len(values)
    resamples = max(MIN_RESAMPLES, min(MAX_RESAMPLES, MAX_DRAWS // count))
    chunk = max(1, CHUNK_CELLS // count)
    means = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        indices = random.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        multiplicity = np.bincount(indices.ravel(), minlength=rows * count).reshape(rows, count)
        means.append(multiplicity.astype(np.float64) @ values / count)
    return np.concatenate(means)


def _interval(mean: float, resampled: np.ndarray) -> ConfidenceInterval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return ConfidenceInterval(mean=float(mean), low=float(low), high=float(high))


def bootstrap_mean(differences: np.ndarray) -> ConfidenceInterval:
    """Returns the mean of paired differences [B] with its confidence interval."""
    return _interval(differences.mean(dtype=np.float64), resampled_means(differences[:, None])[:, 0])


def adaptive_gain(errors: np.ndarray, lengths: Sequence[int], chosen: np.ndarray) -> ConfidenceInterval:
    """Returns the mean error at the chosen lengths minus the error of one fixed length at the same mean tokens.

    The error of the fixed length is interpolated linearly between the mean errors at the two neighbouring lengths. Each
    resample recomputes both the mean of the chosen lengths and the interpolation.

    Args:
        errors: The error of every image at every length, [K, B].
        lengths: Shortest first.
        chosen: The index of each image's length, [B].
    """
    tokens = np.asarray(lengths, np.float64)
    columns = np.column_stack([errors.T, errors[chosen, np.arange(errors.shape[1])], tokens[chosen]]).astype(np.float64)

    def gain(means: np.ndarray) -> np.ndarray:  # [R, K + 2] to [R]
        *fixed, adaptive, mean_tokens = means.T
        if len(tokens) == 1:
            return adaptive - fixed[0]
        low = np.clip(np.searchsorted(tokens, mean_tokens, side="right") - 1, 0, len(tokens) - 2)
        fraction = (mean_tokens - tokens[low]) / (tokens[low + 1] - tokens[low])
        shorter, longer = (np.take_along_axis(means, index[:, None], axis=1)[:, 0] for index in (low, low + 1))
        return adaptive - shorter - fraction * (longer - shorter)

    return _interval(gain(columns.mean(axis=0, keepdims=True))[0], gain(resampled_means(columns)))
