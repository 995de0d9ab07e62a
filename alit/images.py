"""Image files to pixels and back: any bytes in, one square RGB picture or one `ImageError` out.

Shapes: B batch, H W pixels (rows, columns), S the model's side in pixels, C colours (3: red, green, blue).

Reads JPEG, PNG, WebP, GIF (first frame), BMP and TIFF (first page), as `alit.formats` tells them apart. Nothing
global is touched, so threads may decode side by side. Pillow's warnings of damaged metadata are left alone:
silencing them is not thread-safe. Where warnings are errors, the image is refused or its metadata ignored.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageCms, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from alit.errors import ConfigError
from alit.formats import (
    DEFAULT_LIMITS,
    EXTENSIONS,
    PILLOW_WARNS_ABOVE,
    ImageError,
    Limits,
    Reason,
    explain,
    open_image,
)

__all__ = [
    "DEFAULT_LIMITS",
    "EXTENSIONS",
    "JPEG_DECODING",
    "PILLOW_WARNS_ABOVE",
    "Box",
    "DecodedImage",
    "ImageError",
    "JpegMode",
    "Limits",
    "PixelBatch",
    "Pixels",
    "Reason",
    "decode_image",
    "decode_square",
    "encode_image",
    "jpeg_decoding",
    "to_uint8",
]

Pixels = UInt8[np.ndarray, "H W 3"]
FloatImages = Float[Any, "B 3 H W"]  # a torch tensor or an ndarray; torch itself is not needed here
PixelBatch = UInt8[np.ndarray, "B H W 3"]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels from the upper left corner

JPEG_DECODING = "pillow-full"
"""How JPEGs are decoded, for a dataset's metadata: by Pillow at full size, with no DCT-domain downscaling."""
JpegMode = Literal["full", "draft"]
_JPEG_DECODINGS: dict[JpegMode, str] = {"full": JPEG_DECODING, "draft": "pillow-draft-2x"}
_DRAFT_MARGIN = 2  # the 2x above: a draft's square has at least as many times the asked pixels on its side

_UPRIGHT: dict[int | None, Image.Transpose] = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {_UPRIGHT[n] for n in (5, 6, 7, 8)}  # what exchanges width and height
_LAST_COLUMN_FIRST = {_UPRIGHT[n] for n in (2, 3, 6, 7)}  # what puts the stored right or lower edge at the left
_LAST_ROW_FIRST = {_UPRIGHT[n] for n in (3, 4, 7, 8)}  # likewise at the top
_ICC_SPACES = {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}  # Pillow mode -> bytes 16..19 of a profile


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
    return decode_square(data, size, _centre, limits, jpeg)


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
        scale = _draft(source, _DRAFT_MARGIN * size) if jpeg == "draft" else 1
        source.load()
        image = _to_8_bit(source)
        turn = _UPRIGHT.get(_orientation(source))  # a TIFF is upright once loaded
        if turn is not None:
            image = image.transpose(turn)  # before resampling, so that equal pictures give equal pixels
        if scale == 1:
            width, height = image.size
        elif turn in _SIDEWAYS:
            width, height = height, width
        box = _in_draft(choose(width, height), image, width, height, scale, turn)
        image, box = _cut_down(image, box, size)
        square = _to_srgb(image, profile).resize((size, size), Image.Resampling.BICUBIC, box=box)
        # np.array, not asarray: Pillow's buffer is read-only, which torch.from_numpy warns of.
        return DecodedImage(np.array(square), width, height)
    except ImageError:
        raise
    except Exception as error:  # a decoder fed with hostile bytes can raise anything
        raise explain(error, data) from error


def encode_image(pixels: Pixels, format: Literal["png", "jpeg", "webp"] = "png", quality: int | None = None) -> bytes:
    """An image file of these pixels.

    Args:
        pixels: sRGB, uint8 [H, W, 3].
        format: `png` is lossless, `jpeg` and `webp` are lossy.
        quality: 1..100 for `jpeg` and `webp`, 90 where None; None for `png`.

    Raises:
        ValueError: For pixels of another shape or type, another format, or a quality out of range.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(f"pixels must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
    if format not in ("png", "jpeg", "webp"):
        raise ValueError(f"format must be png, jpeg or webp, got {format!r}")
    accepted = "no quality" if format == "png" else "a quality of 1..100"
    if quality is not None and (format == "png" or not 1 <= quality <= 100):
        raise ValueError(f"{format} takes {accepted}, got quality {quality}")
    options = {} if format == "png" else {"quality": 90 if quality is None else quality}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def to_uint8(images: FloatImages) -> PixelBatch:
    """Pixels of a model's images: clamped to [0, 1] and rounded to the nearest of 256 levels.

    Args:
        images: Float [B, 3, H, W], a torch tensor on any device or an ndarray; 0 is black, 1 white.

    Returns:
        uint8 [B, H, W, 3], C-contiguous.

    Raises:
        ValueError: For another shape, for samples that are no floats, or for NaN.
    """
    images_BCHW = images if isinstance(images, np.ndarray) else images.detach().cpu().float().numpy()
    if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3 or images_BCHW.dtype.kind != "f":
        raise ValueError(f"images must be float [B, 3, H, W], got {images_BCHW.dtype} {images_BCHW.shape}")
    if nans := int(np.isnan(images_BCHW).sum()):
        raise ValueError(f"images must be numbers, got {nans} NaN samples")
    levels_BCHW = np.rint(images_BCHW.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(rearrange(levels_BCHW, "B C H W -> B H W C"))


def _to_8_bit(source: ImageFile.ImageFile) -> Image.Image:
    """Deep greyscale as L (LA where one grey level is transparent); all other modes unchanged.

    Pillow clips deep samples instead of scaling them. Of 16-bit colour it reads the high bytes, before this.
    """
    if source.mode not in ("I", "F") and not source.mode.startswith("I;16"):
        return source
    tags: Any = source.tag_v2 if isinstance(source, TiffImageFile) else {}
    values = np.asarray(source)
    white = 1 if source.mode == "F" else 4095 if tags.get(258) == (12,) else 65535  # 258: BitsPerSample
    if not 0 <= values.min() <= values.max() <= white:  # false for NaN too
        raise ImageError(
            "unsupported_pixels",
            f"greyscale samples of this depth are read from 0 (black) to {white} (white), "
            f"got {values.min()} to {values.max()}; rescale them",
        )
    scaled = np.rint(values.astype(np.float32) * np.float32(255 / white)).astype(np.uint8)
    grey = Image.fromarray(255 - scaled if tags.get(262) == 0 else scaled)  # 262: 0 is WhiteIsZero
    if (transparent := source.info.get("transparency")) is not None:
        alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
        grey = Image.merge("LA", (grey, Image.fromarray(alpha)))
    return grey


def _orientation(source: ImageFile.ImageFile) -> int | None:
    """The EXIF orientation; None too where the EXIF is broken, which is no reason to refuse good pixels."""
    try:
        return source.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return None


def _draft(source: ImageFile.ImageFile, least: int) -> int:
    """Has a JPEG decoded with the fewest pixels that leave `least` on its short side; the divisor of both sides."""
    width = source.width
    drafted = source.draft(None, (least, least))  # does nothing to other formats
    return 1 if drafted is None else round(width / drafted[1][2])


def _in_draft(box: Box, image: Image.Image, width: int, height: int, scale: int, turn: Image.Transpose | None) -> Box:
    """A box of the source, width x height pixels, in the coordinates of its draft, turned upright.

    Each pixel of a draft stands for `scale` x `scale` of the source. Where that does not divide the source, the last
    column or row stored reaches beyond the picture, and a turn may have put it first.
    """
    x = image.width - width / scale if turn in _LAST_COLUMN_FIRST else 0
    y = image.height - height / scale if turn in _LAST_ROW_FIRST else 0
    left, top, right, bottom = (edge / scale for edge in box)
    return x + left, y + top, x + right, y + bottom


def _centre(width: int, height: int) -> Box:
    """The largest square in the middle."""
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    return left, top, left + short, top + short


def _cut_down(image: Image.Image, box: Box, size: int) -> tuple[Image.Image, Box]:
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


def _to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """The image over white, in mode RGB."""
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode == "La":  # premultiplied: Pillow has no direct way to RGBA
        image = image.convert("LA")
    if not image.has_transparency_data:
        mode = "L" if grey else "CMYK" if image.mode == "CMYK" else "RGB"
        return _apply_profile(image if image.mode == mode else image.convert(mode), profile)
    rgba = image.convert("RGBA")
    colours = _apply_profile(rgba.getchannel("R") if grey else rgba.convert("RGB"), profile)
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(colours, mask=rgba.getchannel("A"))
    return white


def _apply_profile(colours: Image.Image, profile: object) -> Image.Image:
    """Mode L, RGB or CMYK to sRGB, through the embedded profile if it is sound, fits and is not sRGB."""
    plain = colours if colours.mode == "RGB" else colours.convert("RGB")
    if not isinstance(profile, bytes) or profile[16:20] != _ICC_SPACES[colours.mode]:
        return plain
    try:
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(io.BytesIO(profile), srgb, colours.mode, "RGB", ImageCms.Intent.PERCEPTUAL)
        # A profile's name proves nothing: one that moves no colour of a lattice by more than a level is sRGB.
        lattice = rearrange(17 * np.indices((16, 16, 16)).astype(np.uint8), "C r g b -> (r g) b C")
        probe = Image.fromarray(np.ascontiguousarray(lattice)).convert(colours.mode)
        shift = np.asarray(transform.apply(probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16)
        return plain if abs(shift).max() <= 1 else transform.apply(colours)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return plain
