"""Deep samples become 8 bits, transparency becomes white, and embedded profiles become sRGB."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from made_images import (
    D65_SRGB,
    DEEP,
    DISPLAY_P3,
    SIDE,
    assert_a_close_draft,
    file_of,
    icc_of,
    noise,
    pixels_of,
    png_of,
    reason_of,
    smooth,
    tiff_of,
    waves,
)
from PIL import Image, ImageCms

from alit.images.decode import decode_image
from alit.images.formats import ImageError


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Returns colours over a white background, rounded."""
    return np.floor((rgb * alpha.astype(float) + 255.0 * (255 - alpha)) / 255 + 0.5).astype(int)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_laid_over_white(format):
    """Transparent colours are blended with white exactly."""
    rgba = noise(channels=4)
    data = file_of(rgba, format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    np.testing.assert_array_equal(pixels_of(data), over_white(rgba[..., :3], rgba[..., 3:]))


def test_grey_with_alpha_is_laid_over_white():
    """Transparent greyscale is blended with white exactly."""
    la = noise(channels=2)
    expected = over_white(np.repeat(la[..., :1], 3, axis=2), la[..., 1:])
    np.testing.assert_array_equal(pixels_of(file_of(Image.fromarray(la, "LA"))), expected)


def test_premultiplied_grey_is_laid_over_white():
    """Greyscale that is already multiplied by its alpha is blended with white."""
    data = tiff_of(bytes([100, 128] * 4), 2, 2, tag_258=8, tag_277=2, tag_338=1)
    assert abs(pixels_of(data, 2) - (100 + 127)).max() <= 1


@pytest.mark.parametrize("transparency", [3, bytes([255, 0, 128, 64, 255, 10])])
def test_transparent_palettes_are_laid_over_white(transparency):
    """Transparent entries of a palette are blended with white."""
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


def test_one_transparent_colour_is_white():
    """The one colour that a PNG declares transparent becomes white."""
    rgb = noise() // 128 * 255
    expected = np.where((rgb == (255, 0, 0)).all(axis=-1, keepdims=True), 255, rgb)
    np.testing.assert_array_equal(pixels_of(file_of(rgb, transparency=(255, 0, 0))), expected)


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
def test_16_bit_grey_is_divided_by_257(data):
    """Every container of 16-bit greyscale is scaled by 257, and not clipped."""
    np.testing.assert_array_equal(pixels_of(data), DEEP_GREY)


def test_one_transparent_16_bit_level_is_white():
    """The one 16-bit grey level that a PNG declares transparent becomes white."""
    values = np.where(DEEP < 30000, 30000, DEEP).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    ihdr = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 0, 0, 0, 0)
    data = png_of(ihdr, (b"tRNS", struct.pack(">H", 30000)), (b"IDAT", zlib.compress(rows)))
    expected = np.where((values == 30000)[..., None], 255, np.rint(values / 257)[..., None].repeat(3, -1))
    np.testing.assert_array_equal(pixels_of(data), expected)


def test_12_bit_grey_is_scaled_by_its_white():
    """12-bit greyscale is scaled so that its largest value is white."""
    packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00])  # 4095, 0 / 2048, 0
    pixels = pixels_of(tiff_of(packed, 2, 2, tag_258=12), 2)
    np.testing.assert_array_equal(pixels[..., 0], [[255, 0], [128, 0]])


def test_float_grey_is_read_from_0_to_1():
    """Greyscale in floats from 0 to 1 is scaled; other values are refused with their range."""
    unit = (DEEP / 65535).astype(np.float32)
    np.testing.assert_array_equal(pixels_of(file_of(unit, "TIFF"))[..., 0], np.rint(unit * 255))
    for bad in (unit * 300, unit - 0.5, np.where(unit > 0.5, np.nan, unit).astype(np.float32)):
        assert reason_of(file_of(bad, "TIFF")) == "unsupported_pixels"
    with pytest.raises(ImageError, match=r"-7 to 65528; rescale"):
        decode_image(file_of(Image.fromarray(DEEP.astype(np.int32) - 7), "TIFF"), SIDE)


def test_16_bit_colour_keeps_its_high_bytes():
    """16-bit colours keep the upper 8 of their bits."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in noise().astype(np.uint16) * 256 + 99)
    data = png_of(struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0), (b"IDAT", zlib.compress(rows)))
    np.testing.assert_array_equal(pixels_of(data), noise())


def test_bilevel_is_black_and_white():
    """Images of one bit per pixel become black and white in every format that has them."""
    bits = noise(channels=1)[..., 0] > 127
    for format in ("PNG", "TIFF", "BMP", "GIF"):
        pixels = pixels_of(file_of(Image.fromarray(bits), format))
        np.testing.assert_array_equal(pixels, np.repeat(bits[..., None] * 255, 3, axis=-1))


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_without_a_profile_is_read_as_ink(format):
    """CMYK without a profile is converted as amounts of ink."""
    cmyk = Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0))
    expected = (255, 0, 0)  # magenta + yellow ink, no black: red
    assert abs(pixels_of(file_of(cmyk, format, **({"quality": 95} if format == "JPEG" else {}))) - expected).max() <= 6


def test_lab_becomes_srgb():
    """Lab colours are converted to sRGB."""
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    muted = smooth(SIDE, SIDE) // 2 + 64  # near the edge of the gamut, 8 bits of Lab are coarse
    data = file_of(ImageCms.buildTransform(srgb, lab, "RGB", "LAB").apply(Image.fromarray(muted)), "TIFF")
    assert abs(pixels_of(data) - muted).max() <= 4


@pytest.mark.parametrize(
    "profile", [icc_of(b"RGB ", 2.2, DISPLAY_P3), icc_of(b"RGB ", 1.0, D65_SRGB)], ids=["p3", "linear"]
)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG"])
def test_profiles_are_applied_as_littlecms_does(profile, format):
    """An embedded profile changes the pixels as LittleCMS converts them to sRGB."""
    data = file_of(smooth(SIDE, SIDE), format, icc_profile=profile)
    plain = Image.open(io.BytesIO(data)).convert("RGB")
    expected = ImageCms.profileToProfile(plain, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
    np.testing.assert_array_equal(pixels_of(data), np.asarray(expected))
    assert abs(pixels_of(data) - np.asarray(plain).astype(int)).max() > 5  # so it did something


def test_linear_profile_follows_the_srgb_curve():
    """Linear light is encoded with the curve of IEC 61966-2-1."""
    data = file_of(np.full((SIDE, SIDE, 3), 55, np.uint8), icc_profile=icc_of(b"RGB ", 1.0, D65_SRGB))
    expected = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    assert abs(pixels_of(data) - expected).max() <= 2


def test_transparent_pixels_of_tagged_images_are_white():
    """Transparent pixels of an image with a profile become the white of sRGB."""
    rgba = np.full((SIDE, SIDE, 4), (90, 80, 70, 0), np.uint8)
    assert (pixels_of(file_of(rgba, icc_profile=icc_of(b"RGB ", 1.0, D65_SRGB))) == 255).all()


def test_srgb_profile_changes_nothing():
    """An embedded sRGB profile leaves the pixels unchanged."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(pixels_of(file_of(noise(), icc_profile=srgb)), noise())


@pytest.mark.parametrize("values", [noise(channels=1)[..., 0], DEEP], ids=["8-bit", "16-bit"])
def test_grey_profile_is_applied_to_grey(values):
    """A profile for greyscale is applied to 8-bit and to 16-bit greyscale."""
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
def test_broken_or_unfitting_profile_is_ignored(profile):
    """A profile that is damaged or made for other colours leaves the pixels unchanged."""
    np.testing.assert_array_equal(pixels_of(file_of(noise(), icc_profile=profile)), noise())


def test_profiles_are_applied_to_drafts():
    """An embedded profile is applied to a draft, too."""
    data = file_of(waves(300, 400), "JPEG", quality=90, icc_profile=icc_of(b"RGB ", 1.0, D65_SRGB))
    assert_a_close_draft(data)
