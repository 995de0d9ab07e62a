"""Image codecs at the sizes of token codes, for scale: JPEG and WebP at the quality whose file is nearest in bytes.

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
LOWEST, HIGHEST = 1, 100
"""Qualities."""


class Coded(NamedTuple):
    """What codecs make of images, float32; all bytes are the whole file's, its header included."""

    size: np.ndarray
    """In bytes, [B, C, K]."""
    l1: np.ndarray
    """[B, C, K]."""
    psnr: np.ndarray
    """[B, C, K]."""
    smallest: np.ndarray
    """Bytes at the lowest quality, [B, C]."""


def nearest(encode: Callable[[int], bytes], targets: Sequence[float]) -> list[bytes]:
    """The files whose sizes are nearest to each of `targets`, in bytes.

    Sizes are taken to grow with the quality, as they nearly do. A quality is tried at most once, and at most nine of
    them are for one target: the lowest, the highest, and seven that halve what lies between.

    Args:
        encode: a quality of 1..100 to the file of an image.
        targets: sizes in bytes.
    """
    tried: dict[int, bytes] = {}

    def file(quality: int) -> bytes:
        if quality not in tried:
            tried[quality] = encode(quality)
        return tried[quality]

    def search(target: float) -> bytes:
        low, high = LOWEST, HIGHEST
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


def coded(pixels: np.ndarray, targets: Sequence[float]) -> Coded:
    """Images, uint8 [B, S, S, 3], by every codec at the files nearest to each of `targets` bytes."""
    count, side = pixels.shape[:2]
    shape = (count, len(CODECS), len(targets))
    size, smallest = np.zeros(shape, np.float32), np.zeros(shape[:2], np.float32)
    pictures = np.zeros((*shape, side, side, 3), np.uint8)
    for row, image in enumerate(pixels):
        for column, codec in enumerate(CODECS):

            def encode(quality: int, image: np.ndarray = image, codec: Literal["jpeg", "webp"] = codec) -> bytes:
                return encode_image(image, codec, quality)

            first, *files = nearest(encode, [0, *targets])
            smallest[row, column] = len(first)
            for k, data in enumerate(files):
                size[row, column, k] = len(data)
                pictures[row, column, k] = decode_image(data, side).pixels
    l1, psnr = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    images = _floats(pixels)
    for column in range(len(CODECS)):
        for k in range(len(targets)):
            found = _floats(pictures[:, column, k])
            l1[:, column, k] = pixel.l1(images, found)
            psnr[:, column, k] = pixel.psnr(images, found).clamp(max=HIGHEST_PSNR)
    return Coded(size, l1, psnr, smallest)


def _floats(pixels: np.ndarray) -> torch.Tensor:
    return to_tensor(pixels).float() / 255
