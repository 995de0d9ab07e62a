"""JPEG and WebP at the sizes of token codes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import blob_images
from PIL import Image

from alit.images.encode import encode_image
from jobs.evaluation.image_codecs import measure_codecs, nearest_files


@given(st.lists(st.integers(0, 40), min_size=100, max_size=100), st.lists(st.integers(-10, 4200), max_size=4))
def test_nearest_files_picks_the_nearest_size(growth, targets):
    """The search over qualities finds the sizes nearest to its targets within nine encodings each."""
    sizes = np.cumsum(growth)  # of quality 1, 2, ...
    tried = []

    def encode(quality: int) -> bytes:
        tried.append(quality)
        return bytes(int(sizes[quality - 1]))

    for target, data in zip(targets, nearest_files(encode, targets), strict=True):
        assert abs(len(data) - target) == abs(sizes - target).min()
    assert len(tried) == len(set(tried)) <= 9 * len(targets)


def test_measure_codecs_reaches_sizes_or_the_smallest():
    """Codecs reach the target sizes where they can, and otherwise take their smallest or largest file."""
    pixels = blob_images(3, 64)
    found = measure_codecs(pixels, [10, 900, 1e6])
    sizes = [[len(encode_image(image, codec, 1)) for codec in ("jpeg", "webp")] for image in pixels]
    assert found.smallest.tolist() == sizes
    assert found.size[..., 0].tolist() == sizes
    best = [len(encode_image(image, "jpeg", 100)) for image in pixels]
    assert found.size[:, 0, 2].tolist() == best
    assert (found.size[..., 1] >= found.size[..., 0]).all()
    assert (found.psnr[..., 2] > found.psnr[..., 0]).all()
    image = np.asarray(Image.open(io.BytesIO(encode_image(pixels[0], "jpeg", 1))).convert("RGB"))
    assert found.l1[0, 0, 0] == pytest.approx(np.abs(image.astype(float) - pixels[0]).mean() / 255, abs=1e-6)
