"""Image file formats: detection by the first bytes, size limits, and the reasons for refusing a file.

No global state is changed, so threads may decode in parallel.
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
from alit.validation import require_range

Reason = Literal[
    "empty",  # no bytes
    "too_many_bytes",  # over Limits.max_bytes
    "too_many_pixels",  # over Limits.max_pixels, by the header
    "not_an_image",  # the first bytes match no known image format
    "unsupported_format",  # an image of a known format that is not supported
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
"""Extensions of the files that are read as images; their format is detected from their bytes alone."""
_FORMATS = "JPEG, PNG, WebP, GIF, BMP or TIFF"


class ImageError(AlitError):
    """An image file that cannot be decoded; `str(error)` is a sentence for its owner.

    Attributes:
        reason: A stable identifier, to count and filter by.
        message: The sentence.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)  # both in args, so that the error survives pickling
        self.reason: Reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Size limits of an image file.

    Attributes:
        max_bytes: The largest file, in bytes.
        max_pixels: The largest source, width x height in pixels. Above the default, Pillow warns about some TIFFs and
            GIFs; above twice the default, it refuses them.
    """

    max_bytes: int = 64 * 1024**2
    max_pixels: int = PILLOW_WARNS_ABOVE

    def __post_init__(self) -> None:
        require_range("max_bytes", self.max_bytes, 1, error=ConfigError)
        require_range("max_pixels", self.max_pixels, 1, 2 * PILLOW_WARNS_ABOVE, error=ConfigError)


DEFAULT_LIMITS = Limits()


def open_image(data: bytes, limits: Limits) -> ImageFile.ImageFile:
    """Opens an image file within the limits; reads its header and decodes no pixel.

    Raises:
        ImageError: The format is not supported, or a limit is exceeded.
        Exception: Whatever Pillow raises for a damaged header.
    """
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

    # the decoder's class, as Image.open warns or raises by a global limit of its own before the size is known
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
    """Translates an exception of Pillow to an `ImageError`; `data` are the file's bytes."""
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
