"""Image files decode to squares of pixels, in full or from a draft."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import SIDE, SMALL_FILES, attempt, file_of, noise, pixels_of, reason_of, smooth, waves
from PIL import Image

from alit.errors import ConfigError
from alit.images.decode import JPEG_DECODING, DecodedImage, decode_image, jpeg_decoding
from alit.images.formats import ImageError


@pytest.mark.parametrize("name", SMALL_FILES)
def test_decode_gives_a_writable_rgb_square(name):
    """Every format decodes to a writable RGB square, and the size of the source is reported."""
    decoded = decode_image(SMALL_FILES[name], 24)
    assert isinstance(decoded, DecodedImage)
    assert (decoded.width, decoded.height) == (SIDE, SIDE)
    assert decoded.pixels.shape == (24, 24, 3)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.flags.c_contiguous
    torch.from_numpy(decoded.pixels)  # warns, and so fails here, for a read-only array


@pytest.mark.parametrize("name", ["png", "bmp", "tiff", "tiff-lzw"])
def test_decode_keeps_pixels_of_the_right_size(name):
    """A lossless image of the requested size is decoded without any change."""
    np.testing.assert_array_equal(pixels_of(SMALL_FILES[name]), noise())


def test_decode_reads_jpegs_in_full():
    """A JPEG is decoded at its full size, as Pillow does it, and then resized."""
    data = file_of(smooth(300, 400), "JPEG", quality=80)
    full = (
        Image.open(io.BytesIO(data))
        .convert("RGB")
        .resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(50, 0, 350, 300))
    )
    np.testing.assert_array_equal(pixels_of(data), np.asarray(full))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 48),
    st.sampled_from(["RGB", "L", "LA", "P", "1", "I;16"]),
)
def test_decode_gives_the_requested_shape(width, height, size, mode):
    """An image of any size and mode gives a square of the requested size."""
    image = Image.new(mode, (width, height), 1)
    decoded = decode_image(file_of(image), size)
    assert decoded.pixels.shape == (size, size, 3)
    assert (decoded.width, decoded.height) == (width, height)


def test_decode_fills_the_square_with_one_pixel():
    """An image of one pixel fills the square with its colour."""
    assert (pixels_of(file_of(np.full((1, 1, 3), (7, 130, 250), np.uint8)), 64) == (7, 130, 250)).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_decode_reads_the_first_frame(format):
    """The first frame of an animation or of a file of several pages is decoded."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    first, *others = [Image.new("RGB", (SIDE, SIDE), colour) for colour in colours]
    options = {"lossless": True} if format == "WEBP" else {}
    data = file_of(first, format, save_all=True, append_images=others, **options)
    assert (pixels_of(data) == colours[0]).all()


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_draft_mode_leaves_other_formats_alone(format):
    """Formats other than JPEG are decoded in full in draft mode."""
    data = file_of(waves(300, 400), format)
    draft = decode_image(data, SIDE, jpeg="draft")
    np.testing.assert_array_equal(draft.pixels, pixels_of(data))
    assert (draft.width, draft.height) == (400, 300)


def test_draft_of_a_truncated_file_is_refused():
    """A JPEG that ends too early is refused in draft mode, too."""
    data = file_of(waves(300, 400), "JPEG")
    outcome = attempt(data[: len(data) // 2], SIDE, "draft")
    assert isinstance(outcome, ImageError)
    assert outcome.reason == "truncated"


def test_jpeg_decoding_names_both_modes():
    """The record in a dataset's metadata differs between full decoding and drafts."""
    assert jpeg_decoding("full") == JPEG_DECODING == "pillow-full"
    assert jpeg_decoding("draft") == "pillow-draft-2x"


@pytest.mark.unchecked
def test_decode_refuses_unknown_modes():
    """An unknown mode of JPEG decoding is refused with the modes that exist."""
    message = "JPEGs are decoded in mode 'full' or 'draft', got 'half'"
    with pytest.raises(ConfigError, match=message):
        jpeg_decoding("half")
    for name in ("jpeg", "png"):
        with pytest.raises(ConfigError, match=message):
            decode_image(SMALL_FILES[name], SIDE, jpeg="half")


@pytest.mark.parametrize("name", ["jpeg", "progressive", "png", "webp", "webp-lossless", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_decode_calls_files_cut_short_truncated(name, share):
    """A file of which the last half or tenth is missing is refused as truncated."""
    data = SMALL_FILES[name]
    assert reason_of(data[: int(len(data) * share)]) == "truncated"


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"]),
)
def test_decode_refuses_arbitrary_bytes_with_image_errors(data, start):
    """Arbitrary bytes, also behind the signature of a format, raise no exception but ImageError."""
    outcome = attempt(start + data, 8)
    assert isinstance(outcome, DecodedImage) or str(outcome)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(SMALL_FILES)), st.data())
def test_decode_of_damaged_files_raises_image_errors_only(name, draw):
    """Damaged files are decoded to the requested shape, or refused with an ImageError that can be pickled."""
    data = bytearray(SMALL_FILES[name])
    position = st.integers(0, len(data) - 1) | st.integers(0, 120)  # headers are where the damage tells
    for at, value in draw.draw(st.lists(st.tuples(position, st.integers(0, 255)), max_size=6)):
        data[min(at, len(data) - 1)] = value
    end = draw.draw(st.just(len(data)) | st.integers(0, len(data)))
    jpeg = draw.draw(st.sampled_from(["full", "draft"]))
    outcome = attempt(bytes(data[:end]), 8, jpeg, max_pixels=10**6)  # a low limit keeps a corrupted size cheap
    if isinstance(outcome, ImageError):
        assert str(pickle.loads(pickle.dumps(outcome))) == str(outcome)
    else:
        assert outcome.pixels.shape == (8, 8, 3)
