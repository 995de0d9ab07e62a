"""Means over images."""

from __future__ import annotations

import numpy as np
import pytest
from image_files import blob_images
from small_models import random_model

from jobs.evaluation.models import EvaluationModels
from jobs.evaluation.per_image import measure
from jobs.evaluation.report import measure_adaptive


def test_measure_adaptive_takes_the_first_sufficient_length():
    """The adaptive row uses the first length that meets the threshold, and the longest where none does."""
    models = EvaluationModels(model=random_model())
    measured = measure(models, blob_images(3), np.zeros(3, bool))
    errors = np.array([[0.3, 0.05, 0.4], [0.2, 0.2, 0.4], [0.1, 0.01, 0.4]], np.float32)
    chosen = measured._replace(l1=np.pad(errors.T, ((0, 0), (0, 3))), jpeg_bytes=np.array([300.0, 100.0, 500.0]))
    found = measure_adaptive(chosen, (4, 8, 12), 0.2, bits=0.5)
    assert found.counts == [1, 1, 1]
    assert (found.mean_tokens, found.bits_per_pixel) == (8, 4)
    assert found.satisfied == pytest.approx(2 / 3)
    assert found.l1 == pytest.approx((0.2 + 0.05 + 0.4) / 3)
    assert found.spearman_jpeg == pytest.approx(1.0)
