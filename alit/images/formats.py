"""Which image files are read, what they may cost, and why the others are refused.

Formats are told apart by the first bytes. Nothing global is touched, so threads may decode side by side.
"""

from __future__ import annotations

import io
import operator
import re
import struct
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from alit.errors import AlitError, ConfigError

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


def open_image(data: bytes, limits: Limits) -> ImageFile.ImageFile:
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


def explain(error: Exception, data: bytes) -> ImageError:
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
