"""Files that are no images, too large or too small are refused before a pixel is decoded."""

from __future__ import annotations

import pickle
import struct
import time
import tracemalloc
import zlib

import pytest
from made_images import SIDE, SMALL_FILES, attempt, file_of, png_of, reason_of, tiff_of, waves
from PIL import Image

from alit.images.decode import DecodedImage, decode_image
from alit.images.formats import PILLOW_WARNS_ABOVE, ImageError, Limits


def test_refusals_have_a_reason_and_a_message():
    """A file that is refused has one of the known reasons, and a message that quotes its content."""
    assert reason_of(b"") == "empty"
    assert reason_of(b"<html>404</html>") == "not_an_image"
    assert reason_of(b"\0\0\0\x20ftypavif\0\0\0\0") == "unsupported_format"
    assert reason_of(b'<?xml version="1.0"?>\n<svg/>') == "unsupported_format"
    assert reason_of(SMALL_FILES["png"], max_bytes=100) == "too_many_bytes"
    assert reason_of(tiff_of(b"", 4, 4, tag_258=8, tag_259=99)) == "decode_failed"
    with pytest.raises(ImageError, match=r"<html>404<.*expected a JPEG, PNG"):
        decode_image(b"<html>404</html>", SIDE)
    with pytest.raises(ImageError, match=r"32 x 32, 1,024 pixels to decode; at most 9 are read"):
        decode_image(SMALL_FILES["jpeg"], SIDE, Limits(max_pixels=9))


@pytest.mark.parametrize("name", SMALL_FILES)
def test_pixel_limit_holds_for_every_format(name):
    """Every format is refused above the limit on pixels, and decoded at it."""
    assert reason_of(SMALL_FILES[name], max_pixels=SIDE * SIDE - 1) == "too_many_pixels"
    assert isinstance(attempt(SMALL_FILES[name], SIDE, max_pixels=SIDE * SIDE), DecodedImage)


def test_pixel_limit_holds_for_the_source_of_a_draft():
    """A draft is refused where the full image has too many pixels."""
    data = file_of(waves(300, 400), "JPEG")
    for jpeg in ("full", "draft"):
        outcome = attempt(data, SIDE, jpeg, max_pixels=300 * 400 - 1)
        assert isinstance(outcome, ImageError)
        assert outcome.reason == "too_many_pixels"
        assert "400 x 300" in str(outcome)
        assert isinstance(attempt(data, SIDE, jpeg, max_pixels=300 * 400), DecodedImage)


BOMBS = {
    "png": png_of(struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0), (b"IDAT", zlib.compress(bytes(9999)))),
    "gif": b"GIF89a" + struct.pack("<HHBBB", 20_000, 20_000, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\1\0\0;",
    "gif-frame": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\2\1\0\0;",
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 20_000, 20_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "tiff": tiff_of(b"\0" * 99, 20_000, 20_000, tag_258=8),
    "tiff-tile": tiff_of(b"\0" * 99, 16, 16, tag_258=8, tag_322=20_000, tag_323=20_000),
    "webp": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\x1f\x4e\0" * 2,
    "jpeg": b"\xff\xd8\xff\xc0\0\x11\x08"
    + struct.pack(">HH", 20_000, 20_000)
    + b"\x03\x01\x22\0\x02\x11\x01\x03\x11\x01\xff\xda\0\x0c\x03\1\0\2\0\3\0\0\x3f\0"
    + bytes(99),
    "png-where-pillow-only-warns": png_of(struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0), (b"IDAT", b"")),
}


@pytest.mark.parametrize("name", BOMBS)
def test_headers_of_too_many_pixels_are_refused_at_once(name):
    """A header that announces too many pixels is refused without allocating them."""
    tracemalloc.start()
    start = time.perf_counter()
    reason = reason_of(BOMBS[name])
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reason == "too_many_pixels"
    assert seconds < 1
    assert peak < 2**20


def test_text_and_profile_bombs_stay_small():
    """Compressed texts and profiles of 200 MiB are refused without unpacking them."""
    bomb = zlib.compress(bytes(200 * 2**20), 9)
    ihdr = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixel = (b"IDAT", zlib.compress(b"\0\7"))
    tracemalloc.start()
    for chunk in ((b"zTXt", b"k\0\0" + bomb), (b"iTXt", b"k\0\1\0\0\0" + bomb), (b"iCCP", b"k\0\0" + bomb)):
        assert reason_of(png_of(ihdr, chunk, pixel)) == "decode_failed"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


def test_image_error_survives_pickling():
    """An ImageError keeps its type, reason and message when it is pickled."""
    copy = pickle.loads(pickle.dumps(ImageError("empty", "no bytes")))
    assert (type(copy), copy.reason, str(copy)) == (ImageError, "empty", "no bytes")


def test_limits_refuse_impossible_values():
    """Limits and sizes out of range are refused with the value."""
    with pytest.raises(ValueError, match="max_bytes must be at least 1, got 0"):
        Limits(max_bytes=0)
    with pytest.raises(ValueError, match=rf"max_pixels must be between 1 and {2 * PILLOW_WARNS_ABOVE}, got 400000000"):
        Limits(max_pixels=400_000_000)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        decode_image(SMALL_FILES["png"], 0)


def test_decoding_changes_no_global_of_pillow():
    """Pillow's own limit on pixels is what it was."""
    assert Image.MAX_IMAGE_PIXELS == PILLOW_WARNS_ABOVE
