"""Random crops for training steps, decoded without Ray.

Shapes: S side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from alit.errors import TrainingError
from alit.images.formats import ImageError, Limits
from alit.training.data import crop_randomness, random_crop
from jobs.sources.read import read_rows
from jobs.sources.records import Row, Rows, Source
from jobs.training.feed import Feed

READERS = 16
"""Files that a task reads concurrently, to hide the latency of storage."""


class Cropped(NamedTuple):
    """The crops of one worker's share of a step."""

    pixels: np.ndarray
    """uint8 [n, S, S, 3]."""
    ids: list[str]
    """Ids of the images, in the order of the pixels."""
    rejects: list[tuple[str, str, str]]
    """Id, reason and message of images that cannot be decoded and were replaced by others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cropper:
    """Reads and crops the images of training steps; small when pickled, unlike a feed, whose plan lists all images.

    Attributes:
        source: The input.
        size: Side of the crops in pixels.
        batch_size: Images per step, over all workers.
        seed: Seed of the crops.
        limits: Limits on the size of one image.
    """

    source: Source
    size: int
    batch_size: int
    seed: int
    limits: Limits

    def read(self, first_step: int, images: list[Row]) -> Iterator[tuple[int, Rows]]:
        """Reads the images of successive steps.

        Args:
            first_step: Number of the first step.
            images: The images of all these steps; those of a Parquet file are read together.

        Yields:
            The number of each step, with the bytes of its images.
        """
        group = len(images) if self.source.sliced else self.batch_size
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(images), group):
                rows = read_rows(self.source, images[start : start + group], self.limits.max_bytes, pool)
                yield from enumerate(rows.slices(self.batch_size), first_step + start // self.batch_size)

    def crop(self, step: int, rows: Rows, places: range) -> Cropped:
        """Decodes and crops the images of one worker's share of a step.

        An image that cannot be decoded is replaced by the next one of the step.

        Args:
            step: Number of the step.
            rows: The images of the whole step.
            places: The places of the step that are the worker's.

        Raises:
            TrainingError: None of the step's images can be decoded.
        """
        pixels = np.empty((len(places), self.size, self.size, 3), np.uint8)
        ids: list[str] = []
        failures: dict[int, tuple[str, str]] = {}
        for i, place in enumerate(places):
            for image in (*range(place, self.batch_size), *range(place)):
                if image in failures:
                    continue
                crop = self._crop(rows, image, crop_randomness(self.seed, step, place))
                if isinstance(crop, np.ndarray):
                    pixels[i] = crop
                    ids.append(rows.ids[image])
                    break
                failures[image] = crop
            else:
                raise TrainingError(
                    f"none of the {self.batch_size} images of step {step} can be decoded; "
                    f"the first one, {rows.ids[0]!r}: {failures[0][1]}"
                )
        return Cropped(pixels, ids, [(rows.ids[place], *failures[place]) for place in places if place in failures])

    def _crop(self, rows: Rows, image: int, random: np.random.Generator) -> np.ndarray | tuple[str, str]:
        """Returns the crop of one image, or the reason and the message why it cannot be decoded."""
        if (data := rows.data[image]) is None:
            return "unreadable", rows.errors[image] or "there are no bytes"
        try:
            return random_crop(data, self.size, random, self.limits)
        except ImageError as error:
            return error.reason, str(error)


def make_cropper(feed: Feed) -> Cropper:
    """Returns the cropper of a feed."""
    source, limits = feed.plan.source, feed.limits
    return Cropper(source=source, size=feed.size, batch_size=feed.batch_size, seed=feed.seed, limits=limits)


def worker_share(batch_size: int, worker: int, workers: int) -> range:
    """Returns the places of a step that are one worker's share.

    Raises:
        TrainingError: The batch cannot be divided equally among the workers.
    """
    share, rest = divmod(batch_size, workers)
    if rest:
        raise TrainingError(
            f"batch_size {batch_size} cannot be shared equally by {workers} workers; "
            f"{workers * max(1, share)} or {workers * (share + 1)} can"
        )
    return range(worker * share, (worker + 1) * share)
