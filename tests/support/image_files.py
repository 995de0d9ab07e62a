"""Small images, as pixels and as files."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image


def encoded(pixels: np.ndarray, format: str = "png", orientation: int | None = None) -> bytes:
    """Returns a file of the pixels, perhaps with an EXIF orientation."""
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, exif=exif)
    return file.getvalue()


def noise_image(seed: int, format: str = "png") -> bytes:
    """Returns an image of noise, 30 pixels wide and 20 + seed high."""
    return encoded(np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), np.uint8), format)


def blocks_image(seed: int) -> bytes:
    """Returns an image of 4 x 3 colored blocks, 32 x 24 pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return encoded(coarse.repeat(8, 0).repeat(8, 1))


def blob_images(count: int, size: int = 16) -> np.ndarray:
    """Returns images from smooth to detailed, uint8 [B, S, S, 3]."""
    random = np.random.default_rng(3)
    images = []
    for index in range(count):
        blobs = random.integers(0, 256, (1 + index, 1 + index, 3), np.uint8)
        images.append(np.asarray(Image.fromarray(blobs).resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(images)


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Returns images [B, H, W, 3] as a tensor [B, 3, H, W]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
