"""Orientation, drafts, and the square that is cut from an image."""

from __future__ import annotations

import io

import numpy as np
import pytest
from made_images import SIDE, STORED_AS, assert_a_close_draft, file_of, noise, pixels_of, smooth, waves
from PIL import Image

from alit.images.decode import decode_image


@pytest.mark.parametrize(("width", "height"), [(1, 10_000), (10_000, 1), (20_000, 3)])
def test_extreme_aspect_ratios_show_their_centre(width, height):
    """Very wide and very tall images give the square at their centre."""
    source = np.zeros((height, width, 3), np.uint8)
    source[height // 2 - 40 : height // 2 + 40, width // 2 - 40 : width // 2 + 40] = (200, 100, 50)
    assert (pixels_of(file_of(source)) == (200, 100, 50)).all()


@pytest.mark.parametrize(("width", "height"), [(200, 120), (120, 200), (131, 97), (400, 60), (20, 30)])
def test_one_resampling_equals_resize_then_crop(width, height):
    """Cutting and resizing in one step gives the pixels of resizing first and cutting then."""
    source = smooth(height, width)
    scale = SIDE / min(width, height)
    resized = Image.fromarray(source).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - SIDE) // 2, (resized.height - SIDE) // 2
    expected = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE))).astype(int)
    # The two crops may lie up to half an output pixel apart: allow the gradient's change over that distance.
    step = 200 / SIDE / 2 * min(width, height) / max(width, height)
    assert abs(pixels_of(file_of(source)) - expected).max() <= 2 + step * (
        width * scale % 2 != 0 or height * scale % 2 != 0
    )


def test_cutting_a_panorama_first_changes_no_pixel():
    """A panorama, of which only the middle is resampled, gives the pixels of the whole."""
    source = np.repeat(noise(90, 700), 2, axis=0)
    whole = Image.fromarray(source).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(260, 0, 440, 180))
    np.testing.assert_array_equal(pixels_of(file_of(source)), np.asarray(whole))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_all_eight_orientations_give_the_same_image(orientation, format):
    """An image that is stored in any of the eight EXIF orientations is decoded upright."""
    upright = noise(40, 56)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    stored = np.ascontiguousarray(STORED_AS[orientation](upright))
    decoded = decode_image(file_of(stored, format, exif=exif, **options), SIDE)
    assert (decoded.width, decoded.height) == (56, 40)
    np.testing.assert_array_equal(decoded.pixels, decode_image(file_of(upright), SIDE).pixels)


def test_orientation_applies_to_deep_greyscale():
    """The EXIF orientation is applied to 16-bit greyscale, too."""
    exif = Image.Exif()
    exif[0x0112] = 3
    values = noise(channels=1)[..., 0].astype(np.uint16) * 257
    turned = pixels_of(file_of(values[::-1, ::-1].copy(), exif=exif))
    np.testing.assert_array_equal(turned, pixels_of(file_of(values)))


def test_broken_exif_is_ignored():
    """Broken EXIF data leaves the pixels as they are stored."""
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        np.testing.assert_array_equal(pixels_of(file_of(noise(), exif=exif)), noise())


@pytest.mark.parametrize(("short", "divisor"), [(127, 1), (128, 2), (255, 2), (256, 4), (511, 4), (512, 8), (1100, 8)])
def test_draft_keeps_twice_the_requested_pixels(short, divisor):
    """A draft is the smallest one with at least twice the requested pixels on its short side."""
    data = file_of(waves(short, short + 64), "JPEG", quality=90)
    source = Image.open(io.BytesIO(data))
    source.draft(None, (source.width // divisor, source.height // divisor))
    assert source.height == -(-short // divisor)
    box = (32 / divisor, 0, (32 + short) / divisor, short / divisor)
    expected = np.asarray(source.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))
    draft = decode_image(data, SIDE, jpeg="draft")
    np.testing.assert_array_equal(draft.pixels, expected)
    assert (draft.width, draft.height) == (short + 64, short)
    if divisor == 1:
        np.testing.assert_array_equal(draft.pixels, pixels_of(data))


@pytest.mark.parametrize(
    ("width", "height"), [(512, 512), (513, 519), (257, 401), (397, 131), (2001, 260), (259, 2001)]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_draft_shows_what_full_decoding_shows(width, height, mode):
    """A draft of any size and mode differs little from full decoding."""
    image = Image.fromarray(waves(height, width)).convert(mode)
    assert_a_close_draft(file_of(image, "JPEG", quality=90))
    assert_a_close_draft(file_of(image, "JPEG", quality=90, progressive=True))


@pytest.mark.parametrize("orientation", STORED_AS)
def test_draft_is_turned_upright(orientation):
    """A draft is cut and turned by its EXIF orientation as the full image is."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED_AS[orientation](waves(257, 401)))
    data = file_of(stored, "JPEG", quality=90, exif=exif)
    assert_a_close_draft(data)
    assert decode_image(data, SIDE, jpeg="draft")[1:] == (401, 257)
