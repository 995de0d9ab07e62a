"""Pixels become image files, and the images of a model become pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_images import SIDE, noise, pixels_of, smooth

from alit.images.encode import encode_image, to_uint8


def test_encode_image_round_trips():
    """A PNG holds the exact pixels, a JPEG or WebP of high quality nearly, and a low quality makes a smaller file."""
    np.testing.assert_array_equal(pixels_of(encode_image(noise())), noise())
    for format in ("jpeg", "webp"):
        encoded = encode_image(smooth(SIDE, SIDE), format, quality=95)
        assert abs(pixels_of(encoded) - smooth(SIDE, SIDE)).max() <= 12
        assert len(encode_image(noise(), format, quality=20)) < len(encode_image(noise(), format))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("pixels", "format", "quality"),
    [
        (noise().astype(np.float32), "png", None),
        (noise(channels=4), "png", None),
        (noise()[:0], "png", None),
        (noise(), "tiff", None),
        (noise(), "png", 90),
        (noise(), "jpeg", 101),
    ],
)
def test_encode_image_refuses_other_input(pixels, format, quality):
    """Pixels of another type or shape, unknown formats and impossible qualities are refused with the value."""
    with pytest.raises(ValueError, match="got"):
        encode_image(pixels, format, quality)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_to_uint8_clamps_and_rounds(dtype):
    """Floats of every precision are clamped to [0, 1] and rounded to the nearest of 256 levels."""
    row = torch.tensor([-1.0, 0.0, 0.4, 0.999, 1.0, 7.0, float("inf")], dtype=dtype)
    images = row.view(1, 1, 1, 7).expand(2, 3, 5, 7).requires_grad_()
    pixels = to_uint8(images)
    assert pixels.shape == (2, 5, 7, 3)
    assert pixels.dtype == np.uint8
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 102, 255, 255, 255, 255]
    np.testing.assert_array_equal(pixels, to_uint8(images.detach().float().numpy()))


def test_to_uint8_undoes_division_by_255():
    """Pixels divided by 255 come back exactly, each channel in its place."""
    images = noise().astype(np.float32).transpose(2, 0, 1)[None] / 255
    np.testing.assert_array_equal(to_uint8(images)[0], noise())


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 3, 2, 2), np.uint8),
        np.zeros((3, 2, 2)),
        np.zeros((1, 4, 2, 2)),
        np.full((1, 3, 1, 1), np.nan),
    ],
)
def test_to_uint8_refuses_other_arrays(images):
    """Arrays of another type or shape, and NaN, are refused with the value."""
    with pytest.raises(ValueError, match="got"):
        to_uint8(images)
