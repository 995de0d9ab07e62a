"""Geometry: EXIF orientation, JPEG drafts, and the square that is cut from an image."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile

Pixels = UInt8[np.ndarray, "H W 3"]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels from the upper left corner

DRAFT_MARGIN = 2  # a draft's short side has at least this many times the requested pixels

UPRIGHT: dict[int | None, Image.Transpose] = {  # EXIF orientation to the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


SIDEWAYS = {UPRIGHT[n] for n in (5, 6, 7, 8)}  # transpositions that exchange width and height
_LAST_COLUMN_FIRST = {UPRIGHT[n] for n in (2, 3, 6, 7)}  # those that move the stored right or lower edge to the left
_LAST_ROW_FIRST = {UPRIGHT[n] for n in (3, 4, 7, 8)}  # those that move it to the top


def exif_orientation(source: ImageFile.ImageFile) -> int | None:
    """Returns the EXIF orientation, or None if there is none or the EXIF is broken: the pixels may still be good."""
    try:
        return source.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return None


def request_draft(source: ImageFile.ImageFile, min_side: int) -> int:
    """Makes a JPEG decode at the smallest scale that leaves at least `min_side` pixels on its short side.

    Returns:
        The factor by which both sides are divided; 1 for other formats.
    """
    width = source.width
    drafted = source.draft(None, (min_side, min_side))  # has no effect on other formats
    return 1 if drafted is None else round(width / drafted[1][2])


def box_in_draft(
    box: Box, image: Image.Image, width: int, height: int, scale: int, turn: Image.Transpose | None
) -> Box:
    """Converts a box of the source to the coordinates of its draft, turned upright.

    Each pixel of a draft covers `scale` x `scale` pixels of the source. Where `scale` does not divide the source's
    size, the last stored column or row reaches beyond the image, and a transposition may have put it first.

    Args:
        box: The box, in pixels of the upright source.
        image: The draft, upright.
        width: The width of the upright source.
        height: The height of the upright source.
        scale: The factor that `request_draft` returned.
        turn: The transposition that made the draft upright, if any.
    """
    x = image.width - width / scale if turn in _LAST_COLUMN_FIRST else 0
    y = image.height - height / scale if turn in _LAST_ROW_FIRST else 0
    left, top, right, bottom = (edge / scale for edge in box)
    return x + left, y + top, x + right, y + bottom


def center_box(width: int, height: int) -> Box:
    """Returns the largest centred square of an image of this size."""
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    return left, top, left + short, top + short


def cut_panorama(image: Image.Image, box: Box, size: int) -> tuple[Image.Image, Box]:
    """Crops a panorama to the pixels that the resampling will read, which makes its conversion cheaper.

    Args:
        image: The image.
        box: The square to resample.
        size: The side of the resampled square, in pixels.

    Returns:
        The image and, in its coordinates, the box; both unchanged for squarer images.
    """
    if max(image.size) <= 2 * min(image.size):  # for squarer images the copy would cost more than it saves
        return image, box
    left, top, right, bottom = box
    margin = math.ceil(2 * max(1, (right - left) / size)) + 1  # the filter's radius is 2 pixels of the coarser image
    x, y = max(0, math.floor(left) - margin), max(0, math.floor(top) - margin)
    end_x, end_y = math.ceil(right) + margin, math.ceil(bottom) + margin
    image = image.crop((x, y, min(image.width, end_x), min(image.height, end_y)))
    return image, (left - x, top - y, right - x, bottom - y)
