"""Encoding of pixels as image files, and conversion of a model's output to pixels.

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

FloatImages = Float[Any, "B 3 H W"]  # a torch tensor or an ndarray; this module does not import torch
PixelBatch = UInt8[np.ndarray, "B H W 3"]


def encode_image(
    pixels: Pixels, file_format: Literal["png", "jpeg", "webp"] = "png", quality: int | None = None
) -> bytes:
    """Encodes pixels as an image file.

    Args:
        pixels: sRGB, uint8 [H, W, 3].
        file_format: `png` is lossless, `jpeg` and `webp` are lossy.
        quality: 1 to 100 for `jpeg` and `webp`, 90 when None; must be None for `png`.

    Returns:
        The file's bytes.

    Raises:
        ValueError: The pixels have another shape or type, the format does not exist, or the quality is out of range.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(f"pixels must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
    if file_format not in ("png", "jpeg", "webp"):
        raise ValueError(f"format must be png, jpeg or webp, got {file_format!r}")
    accepted = "no quality" if file_format == "png" else "a quality of 1..100"
    if quality is not None and (file_format == "png" or not 1 <= quality <= 100):
        raise ValueError(f"{file_format} takes {accepted}, got quality {quality}")
    options = {} if file_format == "png" else {"quality": 90 if quality is None else quality}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


def to_uint8(images: FloatImages) -> PixelBatch:
    """Converts a model's output to pixels: clamps to [0, 1] and rounds to the nearest of 256 levels.

    Args:
        images: Float [B, 3, H, W], a torch tensor on any device or an ndarray; 0 is black, 1 white.

    Returns:
        uint8 [B, H, W, 3], C-contiguous.

    Raises:
        ValueError: The images have another shape or type, or contain NaN.
    """
    images_BCHW = images if isinstance(images, np.ndarray) else images.detach().cpu().float().numpy()
    if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3 or images_BCHW.dtype.kind != "f":
        raise ValueError(f"images must be float [B, 3, H, W], got {images_BCHW.dtype} {images_BCHW.shape}")
    if nans := int(np.isnan(images_BCHW).sum()):
        raise ValueError(f"images must be numbers, got {nans} NaN samples")
    levels_BCHW = np.rint(images_BCHW.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(rearrange(levels_BCHW, "B C H W -> B H W C"))
