"""Inputs that the tests of several jobs read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from inputs import IMAGES
from small_models import SMALLER, random_model

from alit.images.encode import encode_image
from alit.weights import save_weights


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image files, to which tests add what names or holds them."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "files").mkdir()
    for i, data in enumerate(IMAGES):
        (folder / "files" / f"{i}.jpg").write_bytes(data)
    return folder


@pytest.fixture
def image_folder(tmp_path):
    """Twelve PNGs of 3 x 3 colored blocks."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (3, 3, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        (folder / f"{i:02d}.png").write_bytes(encode_image(pixels))
    return folder


@pytest.fixture
def small_weights(tmp_path):
    """Weights of a model for 16 px with 4 to 12 tokens."""
    save_weights(tmp_path / "weights", random_model(SMALLER), provenance={})
    return tmp_path / "weights"
