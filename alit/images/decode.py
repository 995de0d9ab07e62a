"""Decoding of image files: any bytes in, one square RGB image or one `ImageError` out.

Shapes: B batch, H W pixels (rows, columns), S the model's side in pixels, C colours (3: red, green, blue).

Reads JPEG, PNG, WebP, GIF (first frame), BMP and TIFF (first page), which `alit.images.formats` distinguishes. No
global state is changed, so threads may decode in parallel. Pillow's warnings about damaged metadata are not silenced,
as that is not thread-safe. Where warnings are errors, the image is refused or its metadata ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from alit.errors import ConfigError
from alit.images.color import to_8_bit, to_srgb
from alit.images.formats import DEFAULT_LIMITS, ImageError, Limits, explain, open_image
from alit.images.geometry import (
    DRAFT_MARGIN,
    SIDEWAYS,
    UPRIGHT,
    Box,
    Pixels,
    box_in_draft,
    center_box,
    cut_panorama,
    exif_orientation,
    request_draft,
)
from alit.validation import require_range

JPEG_DECODING = "pillow-full"
"""The record in a dataset's metadata of JPEGs decoded by Pillow at full size, with no DCT-domain downscaling."""

JpegMode = Literal["full", "draft"]

_JPEG_DECODINGS: dict[JpegMode, str] = {"full": JPEG_DECODING, "draft": "pillow-draft-2x"}


class DecodedImage(NamedTuple):
    """An image at the model's size.

    Attributes:
        pixels: sRGB, uint8 [S, S, 3], C-contiguous.
        width: The width of the source in pixels, as displayed (after EXIF orientation).
        height: The height of the source, likewise.
    """

    pixels: Pixels
    width: int
    height: int


def jpeg_decoding(mode: JpegMode) -> str:
    """Returns the record of a JPEG decoding mode in a dataset's metadata.

    Raises:
        ConfigError: The mode does not exist.
    """
    if mode not in _JPEG_DECODINGS:
        raise ConfigError(f"JPEGs are decoded in mode 'full' or 'draft', got {mode!r}")
    return _JPEG_DECODINGS[mode]


def decode_image(data: bytes, size: int, limits: Limits = DEFAULT_LIMITS, jpeg: JpegMode = "full") -> DecodedImage:
    """Decodes the centre square of an image file, in sRGB, at `size` x `size` pixels.

    EXIF orientation is applied, embedded ICC profiles are converted to sRGB (perceptual intent; broken ones are
    ignored), transparency is laid over white and deep samples are scaled to 8 bits. One antialiased bicubic
    resampling has the effect of resizing the short side to `size` and cropping the centre; smaller images are
    enlarged, even 1 x 1.

    Args:
        data: The file's bytes.
        size: Side of the result in pixels, at least 1.
        limits: Checked before any pixel is decoded, against the source's full size.
        jpeg: `full` decodes all pixels of a JPEG. `draft` has libjpeg decode at a half, a quarter or an eighth of its
            size, the smallest that leaves the short side at least twice `size`: faster for large photographs, but
            with different pixels and therefore different tokens.

    Returns:
        The pixels, and the size of the source.

    Raises:
        ImageError: The bytes cannot be decoded; bad data raises nothing else.
        ValueError: `size` is below 1, or the `jpeg` mode does not exist.
    """
    return decode_square(data, size, center_box, limits, jpeg)


def decode_square(
    data: bytes,
    size: int,
    choose: Callable[[int, int], Box],
    limits: Limits = DEFAULT_LIMITS,
    jpeg: JpegMode = "full",
) -> DecodedImage:
    """Decodes a square of an image file; everything else is as in `decode_image`.

    Args:
        data: The file's bytes.
        size: Side of the result in pixels, at least 1.
        choose: Returns the square, given the image's width and height in pixels, as displayed.
        limits: Checked before any pixel is decoded, against the source's full size.
        jpeg: As in `decode_image`; the scale of a draft depends on the image's short side, not on the square.

    Returns:
        The pixels, and the size of the source.

    Raises:
        ImageError: The bytes cannot be decoded; bad data raises nothing else.
        ValueError: `size` is below 1, or the `jpeg` mode does not exist.
    """
    require_range("size", size, 1, error=ValueError)
    jpeg_decoding(jpeg)  # raises for an unknown mode
    try:
        source = open_image(data, limits)
        profile = source.info.get("icc_profile")
        width, height = source.size
        scale = request_draft(source, DRAFT_MARGIN * size) if jpeg == "draft" else 1
        source.load()
        image = to_8_bit(source)
        turn = UPRIGHT.get(exif_orientation(source))  # a TIFF is upright once loaded
        if turn is not None:
            image = image.transpose(
                turn
            )  # before resampling, so that equal images give equal pixels whatever their orientation
        if scale == 1:
            width, height = image.size
        elif turn in SIDEWAYS:
            width, height = height, width
        box = box_in_draft(choose(width, height), image, width, height, scale, turn)
        image, box = cut_panorama(image, box, size)
        square = to_srgb(image, profile).resize((size, size), Image.Resampling.BICUBIC, box=box)
        # np.array, not asarray: Pillow's buffer is read-only, and torch.from_numpy warns about that.
        return DecodedImage(np.array(square), width, height)
    except ImageError:
        raise
    except Exception as error:  # a decoder fed with hostile bytes can raise anything
        raise explain(error, data) from error
