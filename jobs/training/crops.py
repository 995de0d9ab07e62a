"""The crops of training steps: bytes to pixels, without Ray.

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
"""Files that a task reads side by side: it waits for storage meanwhile."""


class Cropped(NamedTuple):
    """Images of one step."""

    pixels: np.ndarray
    """uint8 [n, S, S, 3]."""
    ids: list[str]
    rejects: list[tuple[str, str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cropper:
    """All that it takes to turn given images into a step's crops; small, unlike a feed, whose plan lists them all."""

    source: Source
    size: int
    batch_size: int
    seed: int
    limits: Limits

    def read(self, first_step: int, images: list[Row]) -> Iterator[tuple[int, Rows]]:
        """The bytes of successive steps, each with its number; of Parquet they are read all at once."""
        at_once = len(images) if self.source.sliced else self.batch_size
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(images), at_once):
                rows = read_rows(self.source, images[start : start + at_once], self.limits.max_bytes, pool)
                yield from enumerate(rows.slices(self.batch_size), first_step + start // self.batch_size)

    def crop(self, step: int, rows: Rows, places: range) -> Cropped:
        """The crops in some places of a step, whose images are `rows`.

        Raises:
            TrainingError: none of the step's images can be decoded.
        """
        pixels = np.empty((len(places), self.size, self.size, 3), np.uint8)
        ids: list[str] = []
        bad: dict[int, tuple[str, str]] = {}
        for i, place in enumerate(places):
            for image in (*range(place, self.batch_size), *range(place)):
                if image in bad:
                    continue
                found = self._crop(rows, image, crop_randomness(self.seed, step, place))
                if isinstance(found, np.ndarray):
                    pixels[i] = found
                    ids.append(rows.ids[image])
                    break
                bad[image] = found
            else:
                raise TrainingError(
                    f"none of the {self.batch_size} images of step {step} can be decoded; "
                    f"the first one, {rows.ids[0]!r}: {bad[0][1]}"
                )
        return Cropped(pixels, ids, [(rows.ids[place], *bad[place]) for place in places if place in bad])

    def _crop(self, rows: Rows, image: int, random: np.random.Generator) -> np.ndarray | tuple[str, str]:
        if (data := rows.data[image]) is None:
            return "unreadable", rows.errors[image] or "there are no bytes"
        try:
            return random_crop(data, self.size, random, self.limits)
        except ImageError as error:
            return error.reason, str(error)


def make_cropper(feed: Feed) -> Cropper:
    source, limits = feed.plan.source, feed.limits
    return Cropper(source=source, size=feed.size, batch_size=feed.batch_size, seed=feed.seed, limits=limits)


def worker_share(batch_size: int, worker: int, workers: int) -> range:
    """The places of a step that are one worker's."""
    share, rest = divmod(batch_size, workers)
    if rest:
        raise TrainingError(
            f"batch_size {batch_size} cannot be shared equally by {workers} workers; "
            f"{workers * max(1, share)} or {workers * (share + 1)} can"
        )
    return range(worker * share, (worker + 1) * share)
