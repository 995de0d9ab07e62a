"""Pixels to image files, and the images of a model to pixels.

Shapes: B batch, H W pixels (rows, columns), C colours (3: red, green, blue).
"""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image

from alit.images.geometry import Pixels

FloatImages = Float[Any, "B 3 H W"]  # a torch tensor or an ndarray; torch itself is not needed here


PixelBatch = UInt8[np.ndarray, "B H W 3"]


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
