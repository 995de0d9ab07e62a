"""What training sees: images cropped at random, in an order fixed by the seed. Pure: the bytes come from elsewhere.

Everything that a batch holds is a function of (seed, step), so that a resumed run continues exactly where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from alit.images.decode import decode_square
from alit.images.formats import DEFAULT_LIMITS, Limits
from alit.images.geometry import Box, Pixels

CHUNK = 2048
"""Images of a chunk, about."""
_SLICES, _CHUNK, _CROP = 1, 2, 3  # what random numbers are for


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


def crop_randomness(seed: int, step: int, place: int) -> np.random.Generator:
    """What the image in one place of a step's batch is cropped by, whoever crops it."""
    return np.random.default_rng((seed, _CROP, step, place))


class StepRange(NamedTuple):
    """Successive steps of one chunk.

    Attributes:
        epoch, chunk: counted from 0, chunks anew in each epoch.
        first, last: steps `first` to `last - 1`, counted from the start of the training.
    """

    epoch: int
    chunk: int
    first: int
    last: int


class Order:
    """Which images each step of a training shows: a function of (seed, step), whatever came before.

    An epoch is as many whole batches as there are; the images that remain are left out, other ones each time. It is a
    permutation of slices, of one image each or of neighbours that are read together, cut into chunks of about 2048
    images that are permuted again: enough of them to mix several slices, and few enough to be held at once. One epoch's
    permutation is held in memory.

    Args:
        slices: how many images each slice has; images are numbered through all slices, from 0.
        batch_size: images per step, no more than there are.
        seed: at least 0.
    """

    def __init__(self, slices: np.ndarray, batch_size: int, seed: int) -> None:
        self.slices, self.batch_size, self.seed = slices, batch_size, seed
        self.total = int(slices.sum())
        self.steps_per_epoch = self.total // batch_size
        self.steps_per_chunk = max(1, round(CHUNK / batch_size))
        self._epoch: int | None = None

    def step_ranges(self, first_step: int, last_step: int) -> Iterator[StepRange]:
        """The chunks that steps `first_step` to `last_step - 1` are made of."""
        while first_step < last_step:
            epoch, at = divmod(first_step, self.steps_per_epoch)
            chunk = at // self.steps_per_chunk
            end = epoch * self.steps_per_epoch + min(self.steps_per_epoch, (chunk + 1) * self.steps_per_chunk)
            yield StepRange(epoch, chunk, first_step, min(end, last_step))
            first_step = end

    def images(self, part: StepRange) -> np.ndarray:
        """The numbers of a part's images, `batch_size` of them for each of its steps."""
        self._enter(part.epoch)
        length = self.steps_per_chunk * self.batch_size
        places = np.arange(part.chunk * length, min((part.chunk + 1) * length, self.total))
        images = places + self._shifts[np.searchsorted(self._ends, places, side="right")]
        images = np.random.default_rng((self.seed, _CHUNK, part.epoch, part.chunk)).permutation(images)
        first = part.first - part.epoch * self.steps_per_epoch - part.chunk * self.steps_per_chunk
        return images[first * self.batch_size : (first + part.last - part.first) * self.batch_size]

    def _enter(self, epoch: int) -> None:
        """Lays the slices one after the other: where each one ends in the epoch, and how far its images move there."""
        if epoch == self._epoch:
            return
        self._epoch = epoch
        shuffled = np.random.default_rng((self.seed, _SLICES, epoch)).permutation(len(self.slices))
        self._ends = np.cumsum(self.slices[shuffled])
        self._shifts = np.cumsum(self.slices)[shuffled] - self._ends
