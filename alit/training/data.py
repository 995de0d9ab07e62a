"""Order and random crops of training images, as pure functions of the seed and the step.

A resumed run therefore continues exactly where it stopped. Reading the images is up to the caller.
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
"""Approximate number of images in a chunk."""
_SLICES, _CHUNK, _CROP = 1, 2, 3  # independent streams of random numbers


def random_crop(data: bytes, size: int, random: np.random.Generator, limits: Limits = DEFAULT_LIMITS) -> Pixels:
    """Decodes a random square of an image file, as `decode_image` does, and mirrors half of the squares.

    The square has 80 to 100 % of the largest one's area, anywhere in the image.

    Args:
        data: The file's bytes.
        size: The side of the result, S, in pixels.
        random: Four numbers are drawn, whatever the image.
        limits: See `decode_image`.

    Returns:
        sRGB, uint8 [S, S, 3].

    Raises:
        ImageError: The bytes cannot be decoded.
    """
    area, x, y, mirror = random.random(4)

    def choose(width: int, height: int) -> Box:
        side = min(width, height) * math.sqrt(0.8 + 0.2 * area)
        left, top = x * (width - side), y * (height - side)
        return left, top, left + side, top + side

    pixels = decode_square(data, size, choose, limits).pixels
    return pixels[:, ::-1] if mirror < 0.5 else pixels


def crop_randomness(seed: int, step: int, position: int) -> np.random.Generator:
    """Returns the random numbers that crop the image at a position of a step's batch, on whichever worker."""
    return np.random.default_rng((seed, _CROP, step, position))


class StepRange(NamedTuple):
    """Consecutive steps within one chunk.

    Attributes:
        epoch: The epoch, from 0.
        chunk: The chunk within the epoch, from 0.
        first: The first step, counted from the start of the training.
        last: The step after the last one.
    """

    epoch: int
    chunk: int
    first: int
    last: int


class Order:
    """The assignment of images to training steps, a function of (seed, step).

    An epoch has as many whole batches as possible; each epoch leaves out other remaining images. It is a permutation of
    slices, of one image each or of neighbours that are read together. The permutation is cut into chunks of about 2048
    images that are permuted again: large enough to mix several slices, small enough to be held in memory. One epoch's
    permutation is held in memory.

    Args:
        slices: The number of images in each slice; images are numbered through all slices, from 0.
        batch_size: The number of images per step, at most the total.
        seed: At least 0.
    """

    def __init__(self, slices: np.ndarray, batch_size: int, seed: int) -> None:
        self.slices, self.batch_size, self.seed = slices, batch_size, seed
        self.total = int(slices.sum())
        self.steps_per_epoch = self.total // batch_size
        self.steps_per_chunk = max(1, round(CHUNK / batch_size))
        self._epoch: int | None = None

    def step_ranges(self, first_step: int, last_step: int) -> Iterator[StepRange]:
        """Yields the steps `first_step` to `last_step - 1`, chunk by chunk."""
        while first_step < last_step:
            epoch, step = divmod(first_step, self.steps_per_epoch)
            chunk = step // self.steps_per_chunk
            end = epoch * self.steps_per_epoch + min(self.steps_per_epoch, (chunk + 1) * self.steps_per_chunk)
            yield StepRange(epoch, chunk, first_step, min(end, last_step))
            first_step = end

    def images(self, steps: StepRange) -> np.ndarray:
        """Returns the numbers of the images of some steps, `batch_size` for each step."""
        self._enter(steps.epoch)
        length = self.steps_per_chunk * self.batch_size
        positions = np.arange(steps.chunk * length, min((steps.chunk + 1) * length, self.total))
        images = positions + self._shifts[np.searchsorted(self._ends, positions, side="right")]
        images = np.random.default_rng((self.seed, _CHUNK, steps.epoch, steps.chunk)).permutation(images)
        first = steps.first - steps.epoch * self.steps_per_epoch - steps.chunk * self.steps_per_chunk
        return images[first * self.batch_size : (first + steps.last - steps.first) * self.batch_size]

    def _enter(self, epoch: int) -> None:
        """Computes where each slice of a shuffled epoch ends, and the offsets from positions to image numbers."""
        if epoch == self._epoch:
            return
        self._epoch = epoch
        shuffled = np.random.default_rng((self.seed, _SLICES, epoch)).permutation(len(self.slices))
        self._ends = np.cumsum(self.slices[shuffled])
        self._shifts = np.cumsum(self.slices)[shuffled] - self._ends
