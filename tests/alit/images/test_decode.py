"""Promises of alit.images, on real files made here by Pillow or byte by byte."""

import io
import pickle
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from alit.errors import ConfigError
from alit.images.decode import JPEG_DECODING, DecodedImage, JpegMode, decode_image, jpeg_decoding
from alit.images.encode import encode_image, to_uint8
from alit.images.formats import PILLOW_WARNS_ABOVE, ImageError, Limits

SIDE = 32


def noise(height: int = SIDE, width: int = SIDE, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture that no sensible resampling can change much."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.rint(np.stack([x, y, (x + y) / 2], axis=-1) * 200 + 20).astype(np.uint8)


def file_of(image: Image.Image | np.ndarray, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, format, **options)
    return file.getvalue()


def pixels_of(data: bytes, size: int = SIDE) -> np.ndarray:
    return decode_image(data, size).pixels.astype(int)


def reason_of(data: bytes, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, SIDE, Limits(**limits))
    return caught.value.reason


def attempt(data: bytes, size: int, jpeg: JpegMode = "full", **limits: int) -> DecodedImage | ImageError:
    """The outcome where either is fine; any other exception passes through and fails the test."""
    try:
        return decode_image(data, size, Limits(**limits), jpeg)
    except ImageError as error:
        return error


def png_of(ihdr: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in [(b"IHDR", ihdr), *chunks, (b"IEND", b"")])


def tiff_of(strip: bytes, width: int, height: int, **tags: int) -> bytes:
    """A little-endian, uncompressed, one-strip TIFF whose further tags are named tag_<number>."""
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


# --- what comes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL_FILES)
def test_decode_gives_a_writable_rgb_square(name):
    """Every format decodes to a writable RGB square and the source size."""
    decoded = decode_image(SMALL_FILES[name], 24)
    assert isinstance(decoded, DecodedImage)
    assert (decoded.width, decoded.height) == (SIDE, SIDE)
    assert decoded.pixels.shape == (24, 24, 3)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.flags.c_contiguous
    torch.from_numpy(decoded.pixels)  # warns, and so fails here, for a read-only array


@pytest.mark.parametrize("name", ["png", "bmp", "tiff", "tiff-lzw"])
def test_decode_keeps_pixels_of_the_right_size(name):
    """A lossless image of the right size comes back unchanged."""
    np.testing.assert_array_equal(pixels_of(SMALL_FILES[name]), noise())


def test_decode_jpeg_is_decoded_in_full_as_pillow_does_it():
    """A JPEG is decoded in full as pillow does the network."""
    data = file_of(smooth(300, 400), "JPEG", quality=80)
    full = (
        Image.open(io.BytesIO(data))
        .convert("RGB")
        .resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(50, 0, 350, 300))
    )
    np.testing.assert_array_equal(pixels_of(data), np.asarray(full))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 48),
    st.sampled_from(["RGB", "L", "LA", "P", "1", "I;16"]),
)
def test_decode_any_source_size_gives_the_asked_shape(width, height, size, mode):
    """Any source size gives the asked shape."""
    image = Image.new(mode, (width, height), 1)
    decoded = decode_image(file_of(image), size)
    assert decoded.pixels.shape == (size, size, 3)
    assert (decoded.width, decoded.height) == (width, height)


@pytest.mark.parametrize(("width", "height"), [(1, 10_000), (10_000, 1), (20_000, 3)])
def test_decode_extreme_aspect_ratios_show_their_centre(width, height):
    """Extreme aspect ratios show their centre."""
    source = np.zeros((height, width, 3), np.uint8)
    source[height // 2 - 40 : height // 2 + 40, width // 2 - 40 : width // 2 + 40] = (200, 100, 50)
    assert (pixels_of(file_of(source)) == (200, 100, 50)).all()


def test_decode_one_pixel_fills_the_square():
    """One pixel fills the square."""
    assert (pixels_of(file_of(np.full((1, 1, 3), (7, 130, 250), np.uint8)), 64) == (7, 130, 250)).all()


@pytest.mark.parametrize(("width", "height"), [(200, 120), (120, 200), (131, 97), (400, 60), (20, 30)])
def test_decode_one_resampling_equals_resize_then_centre_crop(width, height):
    """The one resampling equals resize then centre crop."""
    source = smooth(height, width)
    scale = SIDE / min(width, height)
    resized = Image.fromarray(source).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - SIDE) // 2, (resized.height - SIDE) // 2
    expected = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE))).astype(int)
    # The two crops may lie up to half an output pixel apart: allow the gradient's change over that distance.
    step = 200 / SIDE / 2 * min(width, height) / max(width, height)
    assert abs(pixels_of(file_of(source)) - expected).max() <= 2 + step * (
        width * scale % 2 != 0 or height * scale % 2 != 0
    )


def test_decode_cutting_a_panorama_down_first_changes_no_pixel():
    """Cutting a panorama down first changes no pixel."""
    source = np.repeat(noise(90, 700), 2, axis=0)
    whole = Image.fromarray(source).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(260, 0, 440, 180))
    np.testing.assert_array_equal(pixels_of(file_of(source)), np.asarray(whole))


# --- orientation ------------------------------------------------------------------------------------------

STORED_AS = {  # EXIF 2.3, tag 0x0112: how an upright picture lies in the file
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_decode_all_eight_orientations_give_the_same_picture(orientation, format):
    """All eight orientations give the same picture."""
    upright = noise(40, 56)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    stored = np.ascontiguousarray(STORED_AS[orientation](upright))
    decoded = decode_image(file_of(stored, format, exif=exif, **options), SIDE)
    assert (decoded.width, decoded.height) == (56, 40)
    np.testing.assert_array_equal(decoded.pixels, decode_image(file_of(upright), SIDE).pixels)


def test_decode_orientation_reaches_deep_greyscale_too():
    """Orientation reaches deep greyscale too."""
    exif = Image.Exif()
    exif[0x0112] = 3
    values = noise(channels=1)[..., 0].astype(np.uint16) * 257
    turned = pixels_of(file_of(values[::-1, ::-1].copy(), exif=exif))
    np.testing.assert_array_equal(turned, pixels_of(file_of(values)))


def test_decode_broken_exif_is_ignored():
    """Broken EXIF is ignored."""
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        np.testing.assert_array_equal(pixels_of(file_of(noise(), exif=exif)), noise())


# --- colour -----------------------------------------------------------------------------------------------


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.floor((rgb * alpha.astype(float) + 255.0 * (255 - alpha)) / 255 + 0.5).astype(int)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_decode_alpha_is_laid_over_white_exactly(format):
    """Alpha is laid over white exactly."""
    rgba = noise(channels=4)
    data = file_of(rgba, format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    np.testing.assert_array_equal(pixels_of(data), over_white(rgba[..., :3], rgba[..., 3:]))


def test_decode_grey_with_alpha_is_laid_over_white_exactly():
    """Grey with alpha is laid over white exactly."""
    la = noise(channels=2)
    expected = over_white(np.repeat(la[..., :1], 3, axis=2), la[..., 1:])
    np.testing.assert_array_equal(pixels_of(file_of(Image.fromarray(la, "LA"))), expected)


def test_decode_premultiplied_grey_is_laid_over_white():
    """Premultiplied grey is laid over white."""
    data = tiff_of(bytes([100, 128] * 4), 2, 2, tag_258=8, tag_277=2, tag_338=1)
    assert abs(pixels_of(data, 2) - (100 + 127)).max() <= 1


@pytest.mark.parametrize("transparency", [3, bytes([255, 0, 128, 64, 255, 10])])
def test_decode_palette_transparency_is_laid_over_white(transparency):
    """Palette transparency is laid over white."""
    palette = noise(1, 256)[0]
    indices = noise(channels=1)[..., 0] % 8
    image = Image.fromarray(indices).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(palette.tobytes())
    alphas = np.full(256, 255)
    if isinstance(transparency, int):
        alphas[transparency] = 0
    else:
        alphas[: len(transparency)] = list(transparency)
    expected = over_white(palette[indices], alphas[indices][..., None])
    np.testing.assert_array_equal(pixels_of(file_of(image, transparency=transparency)), expected)


def test_decode_one_transparent_colour_is_white():
    """One transparent colour is white."""
    rgb = noise() // 128 * 255
    expected = np.where((rgb == (255, 0, 0)).all(axis=-1, keepdims=True), 255, rgb)
    np.testing.assert_array_equal(pixels_of(file_of(rgb, transparency=(255, 0, 0))), expected)


DEEP = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
DEEP_GREY = np.repeat(np.rint(DEEP / 257).astype(int)[..., None], 3, axis=-1)


@pytest.mark.parametrize(
    "data",
    [
        file_of(DEEP, "PNG"),
        file_of(DEEP, "TIFF"),
        file_of(DEEP, "TIFF", compression="tiff_lzw"),
        file_of(Image.frombytes("I;16B", (SIDE, SIDE), DEEP.astype(">u2").tobytes()), "TIFF"),
        file_of(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
        tiff_of((65535 - DEEP).astype("<u2").tobytes(), SIDE, SIDE, tag_258=16, tag_262=0),
    ],
    ids=["png", "tiff", "tiff-lzw", "big-endian", "int32", "white-is-zero"],
)
def test_decode_16_bit_grey_is_scaled_by_257_and_not_clipped(data):
    """16 bit grey is scaled by 257 and not clipped."""
    np.testing.assert_array_equal(pixels_of(data), DEEP_GREY)


def test_decode_transparent_16_bit_grey_level_is_white():
    """A transparent 16 bit grey level is white."""
    values = np.where(DEEP < 30000, 30000, DEEP).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    ihdr = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 0, 0, 0, 0)
    data = png_of(ihdr, (b"tRNS", struct.pack(">H", 30000)), (b"IDAT", zlib.compress(rows)))
    expected = np.where((values == 30000)[..., None], 255, np.rint(values / 257)[..., None].repeat(3, -1))
    np.testing.assert_array_equal(pixels_of(data), expected)


def test_decode_12_bit_grey_is_scaled_from_its_own_white():
    """12 bit grey is scaled from its own white."""
    packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00])  # 4095, 0 / 2048, 0
    pixels = pixels_of(tiff_of(packed, 2, 2, tag_258=12), 2)
    np.testing.assert_array_equal(pixels[..., 0], [[255, 0], [128, 0]])


def test_decode_reads_float_grey_from_0_to_1():
    """Float grey is read from 0 to 1 and refused beyond."""
    unit = (DEEP / 65535).astype(np.float32)
    np.testing.assert_array_equal(pixels_of(file_of(unit, "TIFF"))[..., 0], np.rint(unit * 255))
    for bad in (unit * 300, unit - 0.5, np.where(unit > 0.5, np.nan, unit).astype(np.float32)):
        assert reason_of(file_of(bad, "TIFF")) == "unsupported_pixels"
    with pytest.raises(ImageError, match=r"-7 to 65528; rescale"):
        decode_image(file_of(Image.fromarray(DEEP.astype(np.int32) - 7), "TIFF"), SIDE)


def test_decode_16_bit_colour_keeps_its_high_bytes():
    """16 bit colour keeps its high bytes."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in noise().astype(np.uint16) * 256 + 99)
    data = png_of(struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0), (b"IDAT", zlib.compress(rows)))
    np.testing.assert_array_equal(pixels_of(data), noise())


def test_decode_bilevel_is_black_and_white():
    """Bilevel is black and white."""
    bits = noise(channels=1)[..., 0] > 127
    for format in ("PNG", "TIFF", "BMP", "GIF"):
        pixels = pixels_of(file_of(Image.fromarray(bits), format))
        np.testing.assert_array_equal(pixels, np.repeat(bits[..., None] * 255, 3, axis=-1))


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_decode_cmyk_without_a_profile_is_read_as_ink(format):
    """CMYK without a profile is read as ink."""
    cmyk = Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0))
    expected = (255, 0, 0)  # magenta + yellow ink, no black: red
    assert abs(pixels_of(file_of(cmyk, format, **({"quality": 95} if format == "JPEG" else {}))) - expected).max() <= 6


def test_decode_lab_becomes_srgb():
    """Lab becomes sRGB."""
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    muted = smooth(SIDE, SIDE) // 2 + 64  # near the edge of the gamut, 8 bits of Lab are coarse
    data = file_of(ImageCms.buildTransform(srgb, lab, "RGB", "LAB").apply(Image.fromarray(muted)), "TIFF")
    assert abs(pixels_of(data) - muted).max() <= 4


# --- ICC profiles -----------------------------------------------------------------------------------------


def icc_of(space: bytes, gamma: float, primaries: tuple[tuple[float, float, float], ...] = ()) -> bytes:
    """A version 2 profile (ICC.1:2001-04): one gamma and, for RGB, the D50 XYZ of red, green and blue."""

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


@pytest.mark.parametrize(
    "profile", [icc_of(b"RGB ", 2.2, DISPLAY_P3), icc_of(b"RGB ", 1.0, D65_SRGB)], ids=["p3", "linear"]
)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG"])
def test_decode_tagged_image_becomes_what_littlecms_makes_of_it(profile, format):
    """A tagged image becomes what littlecms makes of the network."""
    data = file_of(smooth(SIDE, SIDE), format, icc_profile=profile)
    plain = Image.open(io.BytesIO(data)).convert("RGB")
    expected = ImageCms.profileToProfile(plain, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
    np.testing.assert_array_equal(pixels_of(data), np.asarray(expected))
    assert abs(pixels_of(data) - np.asarray(plain).astype(int)).max() > 5  # so it did something


def test_decode_linear_profile_brightens_as_the_srgb_curve_says():
    """A linear profile brightens as the sRGB curve says."""
    data = file_of(np.full((SIDE, SIDE, 3), 55, np.uint8), icc_profile=icc_of(b"RGB ", 1.0, D65_SRGB))
    expected = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    assert abs(pixels_of(data) - expected).max() <= 2


def test_decode_shows_transparent_pixels_as_white():
    """Transparent pixels of a tagged image are sRGB white."""
    rgba = np.full((SIDE, SIDE, 4), (90, 80, 70, 0), np.uint8)
    assert (pixels_of(file_of(rgba, icc_profile=icc_of(b"RGB ", 1.0, D65_SRGB))) == 255).all()


def test_decode_srgb_profile_changes_nothing():
    """An sRGB profile changes nothing."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(pixels_of(file_of(noise(), icc_profile=srgb)), noise())


@pytest.mark.parametrize("values", [noise(channels=1)[..., 0], DEEP], ids=["8-bit", "16-bit"])
def test_decode_grey_profile_is_applied_to_grey(values):
    """A grey profile is applied to grey."""
    light = (values / np.iinfo(values.dtype).max) ** 1.8
    expected = 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    pixels = pixels_of(file_of(values, icc_profile=icc_of(b"GRAY", 1.8)))
    assert abs(pixels - expected[..., None]).max() <= 3
    assert abs(pixels[..., 0] - values // (values.max() // 255)).max() > 5  # so it did something


@pytest.mark.parametrize(
    "profile",
    [
        b"x",
        b"not a profile" * 40,
        icc_of(b"RGB ", 1.0, DISPLAY_P3)[:200],
        icc_of(b"GRAY", 1.0),
        icc_of(b"CMYK", 1.0),
    ],
    ids=["short", "garbage", "truncated", "for-grey", "for-cmyk"],
)
def test_decode_broken_or_unfitting_profile_is_ignored(profile):
    """A broken or unfitting profile is ignored."""
    np.testing.assert_array_equal(pixels_of(file_of(noise(), icc_profile=profile)), noise())


# --- drafts -----------------------------------------------------------------------------------------------


def waves(height: int, width: int) -> np.ndarray:
    """A picture with an edge and with waves down to 6 pixels of the square at SIDE, so that shifts tell."""
    short = min(height, width) / SIDE
    y, x = np.mgrid[:height, :width] / short
    red = np.sin(x) + np.sin(y * 0.7)
    green = np.sin(x * 0.5 + y * 0.9) * 2
    blue = np.where(x + 2 * y > 1.5 * (width + height) / short / 2, 1.5, -1.5)
    return np.rint(np.stack([red, green, blue], axis=-1) * 50 + 128).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Decibels, for 8 bits."""
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def assert_a_close_draft(data: bytes) -> None:
    """Measured: 45 to 53 dB; 36 dB at most where the square lies wrong by a part of a draft's pixel."""
    full, draft = decode_image(data, SIDE), decode_image(data, SIDE, jpeg="draft")
    assert (draft.width, draft.height) == (full.width, full.height)
    assert (draft.pixels != full.pixels).any()  # so it was one
    assert psnr(draft.pixels, full.pixels) > 44


@pytest.mark.parametrize(("short", "divisor"), [(127, 1), (128, 2), (255, 2), (256, 4), (511, 4), (512, 8), (1100, 8)])
def test_decode_draft_keeps_twice_the_pixels_asked_for(short, divisor):
    """A draft keeps twice the pixels asked for."""
    data = file_of(waves(short, short + 64), "JPEG", quality=90)
    source = Image.open(io.BytesIO(data))
    source.draft(None, (source.width // divisor, source.height // divisor))
    assert source.height == -(-short // divisor)
    box = (32 / divisor, 0, (32 + short) / divisor, short / divisor)
    expected = np.asarray(source.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))
    draft = decode_image(data, SIDE, jpeg="draft")
    np.testing.assert_array_equal(draft.pixels, expected)
    assert (draft.width, draft.height) == (short + 64, short)
    if divisor == 1:
        np.testing.assert_array_equal(draft.pixels, pixels_of(data))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_decode_other_formats_know_no_drafts(format):
    """Other formats know no drafts."""
    data = file_of(waves(300, 400), format)
    draft = decode_image(data, SIDE, jpeg="draft")
    np.testing.assert_array_equal(draft.pixels, pixels_of(data))
    assert (draft.width, draft.height) == (400, 300)


@pytest.mark.parametrize(
    ("width", "height"), [(512, 512), (513, 519), (257, 401), (397, 131), (2001, 260), (259, 2001)]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decode_draft_shows_what_full_decoding_does(width, height, mode):
    """A draft shows what full decoding does."""
    image = Image.fromarray(waves(height, width)).convert(mode)
    assert_a_close_draft(file_of(image, "JPEG", quality=90))
    assert_a_close_draft(file_of(image, "JPEG", quality=90, progressive=True))


@pytest.mark.parametrize("orientation", STORED_AS)
def test_decode_draft_lies_right_after_turning(orientation):
    """A draft lies right after turning."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED_AS[orientation](waves(257, 401)))
    data = file_of(stored, "JPEG", quality=90, exif=exif)
    assert_a_close_draft(data)
    assert decode_image(data, SIDE, jpeg="draft")[1:] == (401, 257)


def test_decode_draft_is_colour_managed():
    """A draft is colour managed."""
    data = file_of(waves(300, 400), "JPEG", quality=90, icc_profile=icc_of(b"RGB ", 1.0, D65_SRGB))
    assert_a_close_draft(data)


def test_decode_limits_hold_for_a_drafts_source():
    """Limits hold for a drafts source."""
    data = file_of(waves(300, 400), "JPEG")
    for jpeg in ("full", "draft"):
        outcome = attempt(data, SIDE, jpeg, max_pixels=300 * 400 - 1)
        assert isinstance(outcome, ImageError)
        assert outcome.reason == "too_many_pixels"
        assert "400 x 300" in str(outcome)
        assert isinstance(attempt(data, SIDE, jpeg, max_pixels=300 * 400), DecodedImage)


def test_decode_draft_of_a_file_cut_short_is_refused():
    """A draft of a file cut short is refused."""
    data = file_of(waves(300, 400), "JPEG")
    outcome = attempt(data[: len(data) // 2], SIDE, "draft")
    assert isinstance(outcome, ImageError)
    assert outcome.reason == "truncated"


def test_decode_metadata_tells_the_modes_apart():
    """Metadata tells the modes apart."""
    assert jpeg_decoding("full") == JPEG_DECODING == "pillow-full"
    assert jpeg_decoding("draft") == "pillow-draft-2x"


@pytest.mark.unchecked
def test_decode_unknown_mode_is_refused():
    """An unknown mode is refused."""
    message = "JPEGs are decoded in mode 'full' or 'draft', got 'half'"
    with pytest.raises(ConfigError, match=message):
        jpeg_decoding("half")
    for name in ("jpeg", "png"):
        with pytest.raises(ConfigError, match=message):
            decode_image(SMALL_FILES[name], SIDE, jpeg="half")


# --- animations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_decode_of_several_frames_the_first_is_read(format):
    """Of several frames the first is read."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    first, *others = [Image.new("RGB", (SIDE, SIDE), colour) for colour in colours]
    options = {"lossless": True} if format == "WEBP" else {}
    data = file_of(first, format, save_all=True, append_images=others, **options)
    assert (pixels_of(data) == colours[0]).all()


# --- what is refused --------------------------------------------------------------------------------------


def test_decode_refusals_carry_a_reason_and_a_sentence():
    """Refusals carry a reason and a sentence."""
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


@pytest.mark.parametrize("name", ["jpeg", "progressive", "png", "webp", "webp-lossless", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_decode_file_cut_short_is_called_truncated(name, share):
    """A file cut short is called truncated."""
    data = SMALL_FILES[name]
    assert reason_of(data[: int(len(data) * share)]) == "truncated"


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


@pytest.mark.parametrize("name", SMALL_FILES)
def test_decode_pixel_limit_holds_for_every_format(name):
    """The pixel limit holds for every format."""
    assert reason_of(SMALL_FILES[name], max_pixels=SIDE * SIDE - 1) == "too_many_pixels"
    assert isinstance(attempt(SMALL_FILES[name], SIDE, max_pixels=SIDE * SIDE), DecodedImage)


@pytest.mark.parametrize("name", BOMBS)
def test_decode_refuses_headers_of_too_many_pixels(name):
    """A header that announces too many pixels is refused at once."""
    tracemalloc.start()
    start = time.perf_counter()
    reason = reason_of(BOMBS[name])
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reason == "too_many_pixels"
    assert seconds < 1
    assert peak < 2**20


def test_decode_text_and_profile_bombs_stay_small():
    """Text and profile bombs stay small."""
    bomb = zlib.compress(bytes(200 * 2**20), 9)
    ihdr = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixel = (b"IDAT", zlib.compress(b"\0\7"))
    tracemalloc.start()
    for chunk in ((b"zTXt", b"k\0\0" + bomb), (b"iTXt", b"k\0\1\0\0\0" + bomb), (b"iCCP", b"k\0\0" + bomb)):
        assert reason_of(png_of(ihdr, chunk, pixel)) == "decode_failed"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"]),
)
def test_decode_arbitrary_bytes_raise_nothing_but_image_errors(data, start):
    """Arbitrary bytes raise nothing but image errors."""
    outcome = attempt(start + data, 8)
    assert isinstance(outcome, DecodedImage) or str(outcome)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(SMALL_FILES)), st.data())
def test_damaged_files_decode_or_raise_image_errors_only(name, draw):
    """Damaged files decode or raise image errors only."""
    data = bytearray(SMALL_FILES[name])
    position = st.integers(0, len(data) - 1) | st.integers(0, 120)  # headers are where the damage tells
    for at, value in draw.draw(st.lists(st.tuples(position, st.integers(0, 255)), max_size=6)):
        data[min(at, len(data) - 1)] = value
    end = draw.draw(st.just(len(data)) | st.integers(0, len(data)))
    jpeg = draw.draw(st.sampled_from(["full", "draft"]))
    outcome = attempt(bytes(data[:end]), 8, jpeg, max_pixels=10**6)  # a low limit keeps a corrupted size cheap
    if isinstance(outcome, ImageError):
        assert str(pickle.loads(pickle.dumps(outcome))) == str(outcome)
    else:
        assert outcome.pixels.shape == (8, 8, 3)


def test_decode_image_error_survives_pickling():
    """An image error survives pickling."""
    copy = pickle.loads(pickle.dumps(ImageError("empty", "no bytes")))
    assert (type(copy), copy.reason, str(copy)) == (ImageError, "empty", "no bytes")


def test_decode_refuses_impossible_limits_and_sizes():
    """Limits and sizes out of range are refused with the value."""
    with pytest.raises(ValueError, match="max_bytes must be at least 1, got 0"):
        Limits(max_bytes=0)
    with pytest.raises(ValueError, match=rf"max_pixels must be between 1 and {2 * PILLOW_WARNS_ABOVE}, got 400000000"):
        Limits(max_pixels=400_000_000)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        decode_image(SMALL_FILES["png"], 0)


def test_decode_decoding_leaves_pillows_globals_alone():
    """Decoding leaves pillows globals alone."""
    assert Image.MAX_IMAGE_PIXELS == PILLOW_WARNS_ABOVE


# --- back to files ----------------------------------------------------------------------------------------


def test_encode_image_round_trips():
    """PNG round trips exactly and the lossy formats nearly."""
    np.testing.assert_array_equal(pixels_of(encode_image(noise())), noise())
    for format in ("jpeg", "webp"):
        encoded = encode_image(smooth(SIDE, SIDE), format, quality=95)
        assert abs(pixels_of(encoded) - smooth(SIDE, SIDE)).max() <= 12
        assert len(encode_image(noise(), format, quality=20)) < len(encode_image(noise(), format))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("pixels", "format", "quality"),
    [
        (noise().astype(np.float32), "png", None),
        (noise(channels=4), "png", None),
        (noise()[:0], "png", None),
        (noise(), "tiff", None),
        (noise(), "png", 90),
        (noise(), "jpeg", 101),
    ],
)
def test_decode_what_cannot_be_encoded_is_refused(pixels, format, quality):
    """What cannot be encoded is refused."""
    with pytest.raises(ValueError, match="got"):
        encode_image(pixels, format, quality)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_decode_to_uint8_clamps_and_rounds(dtype):
    """To uint8 clamps and rounds."""
    row = torch.tensor([-1.0, 0.0, 0.4, 0.999, 1.0, 7.0, float("inf")], dtype=dtype)
    images = row.view(1, 1, 1, 7).expand(2, 3, 5, 7).requires_grad_()
    pixels = to_uint8(images)
    assert pixels.shape == (2, 5, 7, 3)
    assert pixels.dtype == np.uint8
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 102, 255, 255, 255, 255]
    np.testing.assert_array_equal(pixels, to_uint8(images.detach().float().numpy()))


def test_to_uint8_undoes_division_by_255():
    """To uint8 undoes division by 255 and keeps channels apart."""
    images = noise().astype(np.float32).transpose(2, 0, 1)[None] / 255
    np.testing.assert_array_equal(to_uint8(images)[0], noise())


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 3, 2, 2), np.uint8),
        np.zeros((3, 2, 2)),
        np.zeros((1, 4, 2, 2)),
        np.full((1, 3, 1, 1), np.nan),
    ],
)
def test_decode_to_uint8_refuses_what_is_no_image_batch(images):
    """To uint8 refuses what is no image batch."""
    with pytest.raises(ValueError, match="got"):
        to_uint8(images)
