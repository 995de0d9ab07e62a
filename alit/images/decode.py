"""Image files to pixels and back: any bytes in, one square RGB picture or one `ImageError` out.

Shapes: B batch, H W pixels (rows, columns), S the model's side in pixels, C colours (3: red, green, blue).

Reads JPEG, PNG, WebP, GIF (first frame), BMP and TIFF (first page), as `alit.formats` tells them apart. Nothing
global is touched, so threads may decode side by side. Pillow's warnings of damaged metadata are left alone:
silencing them is not thread-safe. Where warnings are errors, the image is refused or its metadata ignored.
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

JPEG_DECODING = "pillow-full"
"""How JPEGs are decoded, for a dataset's metadata: by Pillow at full size, with no DCT-domain downscaling."""


JpegMode = Literal["full", "draft"]


_JPEG_DECODINGS: dict[JpegMode, str] = {"full": JPEG_DECODING, "draft": "pillow-draft-2x"}


class DecodedImage(NamedTuple):
    """A picture as the model takes it.

    Attributes:
        pixels: sRGB, uint8 [S, S, 3], C-contiguous.
        width: Of the source in pixels, as displayed (after EXIF orientation).
        height: Likewise.
    """

    pixels: Pixels
    width: int
    height: int


def jpeg_decoding(mode: JpegMode) -> str:
    """How a mode decodes JPEGs, for a dataset's metadata.

    Raises:
        ConfigError: There is no such mode.
    """
    if mode not in _JPEG_DECODINGS:
        raise ConfigError(f"JPEGs are decoded in mode 'full' or 'draft', got {mode!r}")
    return _JPEG_DECODINGS[mode]


def decode_image(data: bytes, size: int, limits: Limits = DEFAULT_LIMITS, jpeg: JpegMode = "full") -> DecodedImage:
    """The centre square of an image file, in sRGB, at `size` x `size` pixels.

    EXIF orientation is applied, embedded ICC profiles become sRGB (perceptual intent; broken ones ignored),
    transparency is laid over white and deep samples are scaled to 8 bits. One antialiased bicubic resampling
    does what resizing the short side to `size` and cropping the centre would; smaller images are enlarged,
    1 x 1 too.

    Args:
        data: The file's bytes.
        size: Side of the result in pixels, at least 1.
        limits: Checked before any pixel is decoded, against the source's full size.
        jpeg: `full` decodes all of a JPEG's pixels. `draft` has libjpeg make only a half, a quarter or an eighth
            of its width and height, the least that leaves the short side at least twice `size`: faster for large
            photographs, but other pixels, and with them other tokens.

    Raises:
        ImageError: The bytes cannot be decoded, whatever they are; nothing else is raised for bad data.
        ValueError: `size` is below 1, or there is no such `jpeg` mode.
    """
    return decode_square(data, size, center_box, limits, jpeg)


def decode_square(
    data: bytes,
    size: int,
    choose: Callable[[int, int], Box],
    limits: Limits = DEFAULT_LIMITS,
    jpeg: JpegMode = "full",
) -> DecodedImage:
    """A square of an image file's picture; all else is as in `decode_image`.

    Args:
        data: The file's bytes.
        size: Side of the result in pixels, at least 1.
        choose: The square, out of the picture's width and height in pixels, as displayed.
        limits: Checked before any pixel is decoded, against the source's full size.
        jpeg: As in `decode_image`; a draft goes by the picture's short side, whatever the square.

    Raises:
        ImageError: The bytes cannot be decoded, whatever they are; nothing else is raised for bad data.
        ValueError: `size` is below 1, or there is no such `jpeg` mode.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
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
            image = image.transpose(turn)  # before resampling, so that equal pictures give equal pixels
        if scale == 1:
            width, height = image.size
        elif turn in SIDEWAYS:
            width, height = height, width
        box = box_in_draft(choose(width, height), image, width, height, scale, turn)
        image, box = cut_panorama(image, box, size)
        square = to_srgb(image, profile).resize((size, size), Image.Resampling.BICUBIC, box=box)
        # np.array, not asarray: Pillow's buffer is read-only, which torch.from_numpy warns of.
        return DecodedImage(np.array(square), width, height)
    except ImageError:
        raise
    except Exception as error:  # a decoder fed with hostile bytes can raise anything
        raise explain(error, data) from error
