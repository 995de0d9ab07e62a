"""One evaluation for all tests of this folder."""

from __future__ import annotations

from dataclasses import replace

import pytest
from image_files import blob_images
from small_models import TINY, random_model

from jobs.evaluation.job import evaluate
from jobs.evaluation.models import EvaluationModels
from jobs.evaluation.results import Evaluation


@pytest.fixture(scope="session")
def models() -> EvaluationModels:
    """A random model and another one with fewer lengths."""
    return EvaluationModels(
        model=random_model(), fingerprint="f" * 64, against=random_model(replace(TINY, iterations=3), seed=1)
    )


@pytest.fixture(scope="session")
def result(models: EvaluationModels) -> Evaluation:
    """The evaluation of twelve images in two batches."""
    return evaluate(models, [blob_images(12)[:5], blob_images(12)[5:]])
