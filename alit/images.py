"""Image files to pixels and back: any bytes in, one square RGB picture or one `ImageError` out.

Shapes: B batch, H W pixels (rows, columns), S the model's side in pixels, C colours (3: red, green, blue).

Reads JPEG, PNG, WebP, GIF (first frame), BMP and TIFF (first page), told apart by their first bytes. Nothing
global is touched, so threads may decode side by side. Pillow's warnings of damaged metadata are left alone:
silencing them is not thread-safe. Where warnings are errors, the image is refused or its metadata ignored.
"""

from __future__ import annotations

import io
import math
import operator
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageCms, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from alit.errors import AlitError, ConfigError

Pixels = UInt8[np.ndarray, "H W 3"]
FloatImages = Float[Any, "B 3 H W"]  # a torch tensor or an ndarray; torch itself is not needed here
PixelBatch = UInt8[np.ndarray, "B H W 3"]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels from the upper left corner

Reason = Literal[
    "empty",  # no bytes
    "too_many_bytes",  # over Limits.max_bytes
    "too_many_pixels",  # over Limits.max_pixels, by the header
    "not_an_image",  # the first bytes are no image's that we know
    "unsupported_format",  # an image, of a format that we do not read
    "unsupported_pixels",  # a readable format, but samples with no agreed black and white
    "truncated",  # the file ends too early, as far as its decoder can tell
    "decode_failed",  # damaged, or a variant that Pillow cannot read
]

JPEG_DECODING = "pillow-full"
"""How JPEGs are decoded, for a dataset's metadata: by Pillow at full size, with no DCT-domain downscaling."""

PILLOW_WARNS_ABOVE = 1024**3 // 12  # PIL.Image.MAX_IMAGE_PIXELS as it ships: a quarter of a GiB as RGB
_SIGNATURES: tuple[tuple[re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), WebPImageFile),
    (re.compile(rb"GIF8[79]a"), GifImageFile),
    (re.compile(rb"BM"), BmpImageFile),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
)
_FOREIGN_SIGNATURES = (
    ("AVIF or HEIC", re.compile(rb".{4}ftyp(avi|hei|hev|mif|msf)", re.DOTALL)),
    ("JPEG XL", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ")),
    ("JPEG 2000", re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51")),
    ("Photoshop", re.compile(rb"8BPS")),
    ("Windows icon", re.compile(rb"\0\0[\1\2]\0")),
    ("SVG", re.compile(rb"\s*(<\?xml[^>]*>\s*)?<svg\b")),
)
EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
"""Names of files that are taken for images; what they are is told by their bytes alone."""
_FORMATS = "JPEG, PNG, WebP, GIF, BMP or TIFF"

_UPRIGHT: dict[int | None, Image.Transpose] = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ICC_SPACES = {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}  # Pillow mode -> bytes 16..19 of a profile


class ImageError(AlitError):
    """These bytes cannot be tokenized; `str(error)` is a sentence for the person who sent them.

    Attributes:
        reason: A stable slug out of `Reason`, to count and filter by.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)  # both in args, so that the error survives pickling
        self.reason: Reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What an image may cost.

    Attributes:
        max_bytes: Largest file, in bytes.
        max_pixels: Largest source, width x height in pixels. Above the default Pillow warns of some TIFFs and
            GIFs, above twice the default it refuses them.
    """

    max_bytes: int = 64 * 1024**2
    max_pixels: int = PILLOW_WARNS_ABOVE

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ConfigError(f"max_bytes must be at least 1, got {self.max_bytes}")
        if not 1 <= self.max_pixels <= 2 * PILLOW_WARNS_ABOVE:
            raise ConfigError(f"max_pixels must be in 1..{2 * PILLOW_WARNS_ABOVE}, got {self.max_pixels}")


DEFAULT_LIMITS = Limits()


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


def decode_image(data: bytes, size: int, limits: Limits = DEFAULT_LIMITS) -> DecodedImage:
    """The centre square of an image file, in sRGB, at `size` x `size` pixels.

    EXIF orientation is applied, embedded ICC profiles become sRGB (perceptual intent; broken ones ignored),
    transparency is laid over white and deep samples are scaled to 8 bits. One antialiased bicubic resampling
    does what resizing the short side to `size` and cropping the centre would; smaller images are enlarged,
    1 x 1 too. JPEGs are decoded in full: Pillow's draft mode is faster but changes the pixels, and with them
    the tokens.

    Args:
        data: The file's bytes.
        size: Side of the result in pixels, at least 1.
        limits: Checked before any pixel is decoded.

    Raises:
        ImageError: The bytes cannot be decoded, whatever they are; nothing else is raised for bad data.
        ValueError: `size` is below 1.
    """
    return decode_square(data, size, _centre, limits)


def decode_square(
    data: bytes, size: int, choose: Callable[[int, int], Box], limits: Limits = DEFAULT_LIMITS
) -> DecodedImage:
    """A square of an image file's picture; all else is as in `decode_image`.

    Args:
        data: The file's bytes.
        size: Side of the result in pixels, at least 1.
        choose: The square, out of the picture's width and height in pixels, as displayed.
        limits: Checked before any pixel is decoded.

    Raises:
        ImageError: The bytes cannot be decoded, whatever they are; nothing else is raised for bad data.
        ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    try:
        source = _open(data, limits)
        profile = source.info.get("icc_profile")
        source.load()
        image = _to_8_bit(source)
        if (turn := _UPRIGHT.get(_orientation(source))) is not None:  # a TIFF is upright once loaded
            image = image.transpose(turn)  # before resampling, so that equal pictures give equal pixels
        width, height = image.size
        image, box = _cut_down(image, choose(width, height), size)
        square = _to_srgb(image, profile).resize((size, size), Image.Resampling.BICUBIC, box=box)
        # np.array, not asarray: Pillow's buffer is read-only, which torch.from_numpy warns of.
        return DecodedImage(np.array(square), width, height)
    except ImageError:
        raise
    except Exception as error:  # a decoder fed with hostile bytes can raise anything
        raise _explain(error, data) from error


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


def _open(data: bytes, limits: Limits) -> ImageFile.ImageFile:
    """The file's header, within the limits; no pixel is decoded yet."""
    if not data:
        raise ImageError("empty", f"no bytes; expected a {_FORMATS} file")
    if len(data) > limits.max_bytes:
        raise ImageError("too_many_bytes", f"{len(data):,} bytes; at most {limits.max_bytes:,} are read")
    decoder = next((decoder for signature, decoder in _SIGNATURES if signature.match(data)), None)
    if decoder is None:
        foreign = next((name for name, signature in _FOREIGN_SIGNATURES if signature.match(data)), None)
        if foreign is not None:
            raise ImageError("unsupported_format", f"this is a {foreign} file; convert it to {_FORMATS}")
        raise ImageError("not_an_image", f"the file starts with {data[:12]!r}; expected a {_FORMATS} file")

    # The decoder's class, as Image.open warns or raises by a global of its own before we see the size.
    image = decoder(io.BytesIO(data))
    pixels = image.width * image.height
    if isinstance(image, TiffImageFile):  # a small TIFF may declare one huge tile, decoded as a whole
        tile_width, tile_height = (operator.index(image.tag_v2.get(tag, 0)) for tag in (322, 323))
        pixels = max(pixels, tile_width * tile_height)
    if pixels > limits.max_pixels:
        raise ImageError(
            "too_many_pixels",
            f"the image is {image.width:,} x {image.height:,}, {pixels:,} pixels to decode; "
            f"at most {limits.max_pixels:,} are read",
        )
    return image


def _explain(error: Exception, data: bytes) -> ImageError:
    """What Pillow's exception means to the file's owner."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return ImageError("too_many_pixels", f"the image is too large: {error}")
    unfinished_webp = data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") + 8 > len(data)
    unfinished_png = "broken PNG file (chunk b'')" in str(error)
    ran_out = isinstance(error.__cause__, (EOFError, struct.error)) or isinstance(error, EOFError)
    if unfinished_webp or unfinished_png or ran_out or "truncated" in str(error).lower():
        return ImageError("truncated", f"the file ends too early, after {len(data):,} bytes ({error})")
    return ImageError(
        "decode_failed", f"the file is damaged or of an unreadable kind ({type(error).__name__}: {error})"
    )


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
