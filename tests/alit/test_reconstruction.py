"""Measures of images and codes against independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from image_files import blob_images, to_tensor

from alit.reconstruction import gradient_entropy, perplexity

pytestmark = pytest.mark.numeric


def test_perplexity_is_the_exponential_of_the_entropy():
    """The perplexity of ids is e to the power of their entropy."""
    ids = np.random.default_rng(0).integers(0, 40, (7, 9)) ** 2 // 40
    counts = np.bincount(ids.ravel(), minlength=64)
    assert perplexity(ids, 64) == pytest.approx(math.exp(scipy.stats.entropy(counts)))
    assert perplexity(np.arange(10).repeat(3), 64) == pytest.approx(10)


def test_gradient_entropy_agrees_with_numpy():
    """The gradient entropy is 0 for a flat image and the entropy of the gradients' histogram otherwise."""
    flat = np.full((1, 32, 32, 3), 77, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    smooth = blob_images(4, 32)[3:]
    found = gradient_entropy(to_tensor(np.concatenate([flat, smooth, noise])))
    assert found[0] == 0
    assert 0 < found[1] < found[2]
    assert found[2] > 4
    luma = noise[0].astype(np.float64) @ [0.299, 0.587, 0.114] / 255
    magnitude = np.hypot(np.diff(luma, axis=1)[:-1], np.diff(luma, axis=0)[:, :-1])
    counts, _ = np.histogram(magnitude, bins=64, range=(0, math.sqrt(2)))
    assert found[2] == pytest.approx(scipy.stats.entropy(counts, base=2), abs=0.01)
