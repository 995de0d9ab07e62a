"""Colour conversion: deep samples to 8 bits, transparency over white, embedded ICC profiles to sRGB."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image, ImageCms, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from alit.images.formats import ImageError

_ICC_SPACES = {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}  # Pillow mode -> bytes 16..19 of a profile


def to_8_bit(source: ImageFile.ImageFile) -> Image.Image:
    """Converts deep greyscale to L (LA where one grey level is transparent); other modes pass unchanged.

    Pillow would clip deep samples instead of scaling them. Of 16-bit colour it has already read the high bytes.

    Raises:
        ImageError: The samples exceed the white level of their depth.
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


def to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """Converts an image to sRGB over a white background, in mode RGB; `profile` is the embedded ICC profile, if any."""
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
    """Converts mode L, RGB or CMYK to sRGB, with the embedded profile if it is valid, fits the mode and is not sRGB."""
    plain = colours if colours.mode == "RGB" else colours.convert("RGB")
    if not isinstance(profile, bytes) or profile[16:20] != _ICC_SPACES[colours.mode]:
        return plain
    try:
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(io.BytesIO(profile), srgb, colours.mode, "RGB", ImageCms.Intent.PERCEPTUAL)
        # A profile's name is unreliable: one that moves no colour of a lattice by more than one level counts as sRGB.
        lattice = rearrange(17 * np.indices((16, 16, 16)).astype(np.uint8), "C r g b -> (r g) b C")
        probe = Image.fromarray(np.ascontiguousarray(lattice)).convert(colours.mode)
        shift = np.asarray(transform.apply(probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16)
        return plain if abs(shift).max() <= 1 else transform.apply(colours)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return plain
