"""JPEG and WebP for comparison, at the quality whose file is nearest in size to the token codes.

Shapes: B batch, S the model's side in pixels, C codecs, K sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from alit.images.decode import decode_image
from alit.images.encode import encode_image
from alit.images.tensors import to_tensor
from alit.metrics import pixel
from alit.reconstruction import HIGHEST_PSNR

CODECS: tuple[Literal["jpeg", "webp"], ...] = ("jpeg", "webp")
MIN_QUALITY, MAX_QUALITY = 1, 100


class CodecMeasurements(NamedTuple):
    """Sizes and distortions of codec files, float32; sizes are of whole files, headers included."""

    size: np.ndarray
    """In bytes, [B, C, K]."""
    l1: np.ndarray
    """[B, C, K]."""
    psnr: np.ndarray
    """In dB, [B, C, K]."""
    smallest: np.ndarray
    """Bytes at the lowest quality, [B, C]."""


def nearest_files(encode: Callable[[int], bytes], targets: Sequence[float]) -> list[bytes]:
    """Returns the files whose sizes are nearest to each of the targets.

    Sizes are assumed to grow with the quality, which nearly holds. Every quality is tried at most once, and at most
    nine for one target: the lowest, the highest, and seven by bisection.

    Args:
        encode: Returns an image's file at a quality of 1 to 100.
        targets: Sizes in bytes.
    """
    files: dict[int, bytes] = {}

    def file(quality: int) -> bytes:
        if quality not in files:
            files[quality] = encode(quality)
        return files[quality]

    def search(target: float) -> bytes:
        low, high = MIN_QUALITY, MAX_QUALITY
        if len(file(low)) >= target:
            return file(low)
        if len(file(high)) <= target:
            return file(high)
        while high - low > 1:
            middle = (low + high) // 2
            if len(file(middle)) <= target:
                low = middle
            else:
                high = middle
        return min(file(low), file(high), key=lambda data: abs(len(data) - target))

    return [search(target) for target in targets]


def measure_codecs(pixels: np.ndarray, targets: Sequence[float]) -> CodecMeasurements:
    """Encodes images with every codec at the sizes nearest to the targets, and measures the results.

    Args:
        pixels: uint8 [B, S, S, 3].
        targets: Sizes in bytes, K of them.
    """
    count, side = pixels.shape[:2]
    shape = (count, len(CODECS), len(targets))
    size, smallest = np.zeros(shape, np.float32), np.zeros(shape[:2], np.float32)
    decoded = np.zeros((*shape, side, side, 3), np.uint8)
    for row, image in enumerate(pixels):
        for column, codec in enumerate(CODECS):

            def encode(quality: int, image: np.ndarray = image, codec: Literal["jpeg", "webp"] = codec) -> bytes:
                return encode_image(image, codec, quality)

            first, *files = nearest_files(encode, [0, *targets])
            smallest[row, column] = len(first)
            for k, data in enumerate(files):
                size[row, column, k] = len(data)
                decoded[row, column, k] = decode_image(data, side).pixels
    l1, psnr = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    images = _to_float(pixels)
    for column in range(len(CODECS)):
        for k in range(len(targets)):
            reconstructions = _to_float(decoded[:, column, k])
            l1[:, column, k] = pixel.l1(images, reconstructions)
            psnr[:, column, k] = pixel.psnr(images, reconstructions).clamp(max=HIGHEST_PSNR)
    return CodecMeasurements(size, l1, psnr, smallest)


def _to_float(pixels: np.ndarray) -> torch.Tensor:
    return to_tensor(pixels).float() / 255
