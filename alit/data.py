"""Training data without Ray: photographs from folders or Parquet, cropped at random, in an order fixed by the seed.

Everything a batch holds is a function of (seed, step), so that a resumed run continues exactly where it stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from alit.errors import TrainingError
from alit.images import DEFAULT_LIMITS, EXTENSIONS, Box, Limits, Pixels, decode_image, decode_square


def read_photographs(path: str | Path) -> list[bytes]:
    """Every image's bytes of a Parquet file (column `image`), or of a folder of Parquet or image files, sorted by name.

    Held in memory as they are compressed: about 7 KB per 136-pixel JPEG.

    Raises:
        TrainingError: nothing was found.
    """
    path = Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else sorted(path.parent.glob(path.name))
    photographs: list[bytes] = []
    for file in files:
        if file.suffix == ".parquet":
            photographs += pq.read_table(file, columns=["image"]).column("image").to_pylist()
        elif file.suffix.lower() in EXTENSIONS and file.is_file():
            photographs.append(file.read_bytes())
    if not photographs:
        raise TrainingError(
            f"no photographs in {str(path)!r}: give a folder of images, or Parquet with a column 'image'"
        )
    return photographs


def center_crops(photographs: Sequence[bytes], size: int) -> Tensor:
    """All photographs as inference sees them, uint8 [B, 3, size, size]."""
    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(lambda data: decode_image(data, size).pixels, photographs))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def random_crop(data: bytes, size: int, random: np.random.Generator, limits: Limits = DEFAULT_LIMITS) -> Pixels:
    """A random square of an image file at `size` x `size` pixels, uint8 [S, S, 3], mirrored half of the time.

    The square has 80 to 100 % of the largest one's area and lies anywhere in the picture. Four numbers are drawn,
    whatever the image; it is decoded as `decode_image` does.

    Raises:
        ImageError: the bytes cannot be decoded.
    """
    area, x, y, mirror = random.random(4)

    def choose(width: int, height: int) -> Box:
        side = min(width, height) * math.sqrt(0.8 + 0.2 * area)
        left, top = x * (width - side), y * (height - side)
        return left, top, left + side, top + side

    pixels = decode_square(data, size, choose, limits).pixels
    return pixels[:, ::-1] if mirror < 0.5 else pixels


def training_batches(
    photographs: Sequence[bytes], *, size: int, batch_size: int, seed: int, first_step: int = 0, ahead: int = 4
) -> Iterator[Tensor]:
    """Endless training batches, uint8 [batch_size, 3, size, size], from `first_step` on, decoded ahead in threads.

    Each epoch is one permutation; a last incomplete batch is left out, other images each time.

    Raises:
        TrainingError: fewer photographs than a batch holds.
    """
    per_epoch = len(photographs) // batch_size
    if per_epoch == 0:
        raise TrainingError(f"batch_size {batch_size} is larger than the data: {len(photographs)} photographs")

    def make(step: int) -> Tensor:
        epoch, position = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(photographs))
        random = np.random.default_rng((seed, epoch, position))
        rows = order[position * batch_size : (position + 1) * batch_size]
        pixels = np.stack([random_crop(photographs[row], size, random) for row in rows])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    with ThreadPoolExecutor(2) as pool:
        waiting: deque[Future[Tensor]] = deque()
        step = first_step
        try:
            while True:
                while len(waiting) < ahead:
                    waiting.append(pool.submit(make, step))
                    step += 1
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
