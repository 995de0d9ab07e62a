"""Image files made by Pillow or byte by byte, and the outcomes of decoding them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from alit.images.decode import DecodedImage, JpegMode, decode_image
from alit.images.formats import ImageError, Limits

SIDE = 32


def noise(height: int = SIDE, width: int = SIDE, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Returns an image that no sensible resampling can change much."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.rint(np.stack([x, y, (x + y) / 2], axis=-1) * 200 + 20).astype(np.uint8)


def waves(height: int, width: int) -> np.ndarray:
    """Returns an image with an edge and with waves down to 6 pixels of the square at SIDE, so that shifts show."""
    short = min(height, width) / SIDE
    y, x = np.mgrid[:height, :width] / short
    red = np.sin(x) + np.sin(y * 0.7)
    green = np.sin(x * 0.5 + y * 0.9) * 2
    blue = np.where(x + 2 * y > 1.5 * (width + height) / short / 2, 1.5, -1.5)
    return np.rint(np.stack([red, green, blue], axis=-1) * 50 + 128).astype(np.uint8)


def file_of(image: Image.Image | np.ndarray, format: str = "PNG", **options: object) -> bytes:
    """Returns an image as a file."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, format, **options)
    return file.getvalue()


def pixels_of(data: bytes, size: int = SIDE) -> np.ndarray:
    """Returns the decoded pixels of a file, as integers that may be subtracted."""
    return decode_image(data, size).pixels.astype(int)


def reason_of(data: bytes, **limits: int) -> str:
    """Returns the reason for which a file is refused."""
    with pytest.raises(ImageError) as caught:
        decode_image(data, SIDE, Limits(**limits))
    return caught.value.reason


def attempt(data: bytes, size: int, jpeg: JpegMode = "full", **limits: int) -> DecodedImage | ImageError:
    """Returns the outcome where either is fine; any other exception passes through and fails the test."""
    try:
        return decode_image(data, size, Limits(**limits), jpeg)
    except ImageError as error:
        return error


def png_of(ihdr: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Returns a PNG of these chunks."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in [(b"IHDR", ihdr), *chunks, (b"IEND", b"")])


def tiff_of(strip: bytes, width: int, height: int, **tags: int) -> bytes:
    """Returns a little-endian, uncompressed, one-strip TIFF whose further tags are named tag_<number>."""
    entries = {256: width, 257: height, 259: 1, 262: 1, 273: 0, 277: 1, 278: height, 279: len(strip)}
    entries |= {int(name.removeprefix("tag_")): value for name, value in tags.items()}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    ifd = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + ifd + struct.pack("<I", 0) + strip


SMALL_FILES = {
    "jpeg": file_of(noise(), "JPEG"),
    "progressive": file_of(noise(), "JPEG", progressive=True),
    "jpeg-cmyk": file_of(Image.fromarray(noise()).convert("CMYK"), "JPEG"),
    "png": file_of(noise()),
    "png-palette": file_of(Image.fromarray(noise()).quantize(16)),
    "webp": file_of(noise(), "WEBP"),
    "webp-lossless": file_of(noise(channels=4), "WEBP", lossless=True),
    "gif": file_of(Image.fromarray(noise()).quantize(16), "GIF"),
    "bmp": file_of(noise(), "BMP"),
    "tiff": file_of(noise(), "TIFF"),
    "tiff-lzw": file_of(noise(), "TIFF", compression="tiff_lzw"),
    "tiff-deflate": file_of(noise(channels=4), "TIFF", compression="tiff_adobe_deflate"),
}
STORED_AS = {  # EXIF 2.3, tag 0x0112: how an upright image is stored in the file
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}
DEEP = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)


def icc_of(space: bytes, gamma: float, primaries: tuple[tuple[float, float, float], ...] = ()) -> bytes:
    """Returns a version 2 profile (ICC.1:2001-04): one gamma and, for RGB, the D50 XYZ of red, green and blue."""

    def s15(*numbers: float) -> bytes:
        return b"".join(struct.pack(">i", round(n * 65536)) for n in numbers)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    desc = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78 + b"\0"
    tags = {
        b"desc": desc,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": b"XYZ \0\0\0\0" + s15(0.9642, 1, 0.8249),
    }
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    for letter, xyz in zip(b"rgb", primaries, strict=False):
        tags[bytes([letter]) + b"TRC"] = curve
        tags[bytes([letter]) + b"XYZ"] = b"XYZ \0\0\0\0" + s15(*xyz)
    body, table, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(value))
        body += value + b"\0" * (-len(value) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"\0" * 4, 0x02400000, b"mntr", space, b"XYZ ")
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + s15(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


D65_SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Returns decibels, for 8 bits."""
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def assert_a_close_draft(data: bytes) -> None:
    """Asserts that a draft is within 44 dB: 45 to 53 dB were measured, and 36 dB at most where the square is cut
    wrongly by a part of a pixel of the draft.
    """
    full, draft = decode_image(data, SIDE), decode_image(data, SIDE, jpeg="draft")
    assert (draft.width, draft.height) == (full.width, full.height)
    assert (draft.pixels != full.pixels).any()  # so it was one
    assert psnr(draft.pixels, full.pixels) > 44
