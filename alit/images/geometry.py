"""Geometry: EXIF orientation, JPEG drafts, and the square that is cut from an image."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile

Pixels = UInt8[np.ndarray, "H W 3"]


Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels from the upper left corner


DRAFT_MARGIN = 2  # the 2x above: a draft's square has at least as many times the asked pixels on its side


UPRIGHT: dict[int | None, Image.Transpose] = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


SIDEWAYS = {UPRIGHT[n] for n in (5, 6, 7, 8)}  # what exchanges width and height


_LAST_COLUMN_FIRST = {UPRIGHT[n] for n in (2, 3, 6, 7)}  # what puts the stored right or lower edge at the left


_LAST_ROW_FIRST = {UPRIGHT[n] for n in (3, 4, 7, 8)}  # likewise at the top


def exif_orientation(source: ImageFile.ImageFile) -> int | None:
    """The EXIF orientation; None too where the EXIF is broken, which is no reason to refuse good pixels."""
    try:
        return source.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return None


def request_draft(source: ImageFile.ImageFile, least: int) -> int:
    """Has a JPEG decoded with the fewest pixels that leave `least` on its short side; the divisor of both sides."""
    width = source.width
    drafted = source.draft(None, (least, least))  # does nothing to other formats
    return 1 if drafted is None else round(width / drafted[1][2])


def box_in_draft(
    box: Box, image: Image.Image, width: int, height: int, scale: int, turn: Image.Transpose | None
) -> Box:
    """A box of the source, width x height pixels, in the coordinates of its draft, turned upright.

    Each pixel of a draft stands for `scale` x `scale` of the source. Where that does not divide the source, the last
    column or row stored reaches beyond the picture, and a turn may have put it first.
    """
    x = image.width - width / scale if turn in _LAST_COLUMN_FIRST else 0
    y = image.height - height / scale if turn in _LAST_ROW_FIRST else 0
    left, top, right, bottom = (edge / scale for edge in box)
    return x + left, y + top, x + right, y + bottom


def center_box(width: int, height: int) -> Box:
    """The largest square in the middle."""
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    return left, top, left + short, top + short


def cut_panorama(image: Image.Image, box: Box, size: int) -> tuple[Image.Image, Box]:
    """The image and, in its coordinates, the box of the square to resample.

    A panorama is first cut down to what the resampling will read: the same pixels, cheaper to convert.
    """
    if max(image.size) <= 2 * min(image.size):  # for squarer images the copy would cost more than it saves
        return image, box
    left, top, right, bottom = box
    margin = math.ceil(2 * max(1, (right - left) / size)) + 1  # the filter reaches 2 pixels of the coarser image
    x, y = max(0, math.floor(left) - margin), max(0, math.floor(top) - margin)
    end_x, end_y = math.ceil(right) + margin, math.ceil(bottom) + margin
    image = image.crop((x, y, min(image.width, end_x), min(image.height, end_y)))
    return image, (left - x, top - y, right - x, bottom - y)
