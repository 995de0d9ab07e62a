"""The training data feed: photographs from anywhere, in an order fixed by the seed (`alit.data`), cropped at random.

Ray Data makes the batches on CPUs anywhere in the cluster (`shared_batches`), or threads of this process do without Ray
(`local_batches`): the same ones, bit for bit, whoever makes them, for however many workers, from whichever step on. A
chunk of the order is what is read at once and what one of Ray's tasks does.

Shapes: B images of a step over all workers, b of one worker's share, S side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from alit.errors import TrainingError
from alit.images.formats import DEFAULT_LIMITS, Limits
from alit.images.tensors import to_tensor
from alit.training.data import Order
from jobs.sources.decode import decode_plan
from jobs.sources.open import make_plan
from jobs.sources.records import Plan, Row

SLICE = 256
"""Neighbouring rows of Parquet that stay together in a chunk, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """What to train on, and in which order; picklable.

    Attributes:
        plan: the images; its shards are the slices that are permuted.
        size: side of the crops in pixels.
        batch_size: images per step, over all workers.
        seed: of the order and of the crops.
        limits: what one image may cost.
    """

    plan: Plan
    size: int
    batch_size: int
    seed: int
    limits: Limits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("batch_size", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise TrainingError(f"{name} must be at least {least}, got {value}")
        if self.batch_size > self.plan.images:
            raise TrainingError(f"batch_size {self.batch_size} is larger than the data: {self.plan.images} images")

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches; the images that remain are left out, other ones in each epoch."""
        return self.plan.images // self.batch_size

    def order(self) -> Order:
        """Image files are shuffled one by one; Parquet, whose neighbours are read together, by slices and in chunks."""
        shards = self.plan.shards
        slices = [shard.rows for shard in shards] if self.plan.source.sliced else np.ones(self.plan.images, int)
        return Order(np.array(slices), self.batch_size, self.seed)

    def rows(self, images: np.ndarray) -> list[Row]:
        """Where images lie, by their numbers in the order."""
        shards, ends = self.plan.shards, np.cumsum([shard.rows for shard in self.plan.shards])
        found = []
        for image, number in zip(images.tolist(), np.searchsorted(ends, images, side="right").tolist(), strict=True):
            shard = shards[number]
            offset = image - int(ends[number]) + shard.rows
            sliced = self.plan.source.sliced
            found.append(Row(shard.paths[0], shard.start + offset) if sliced else Row(shard.paths[offset], 0))
        return found


def make_feed(
    uri: str, *, size: int, batch_size: int, seed: int, image_column: str = "image", limits: Limits = DEFAULT_LIMITS
) -> Feed:
    """Lists the photographs that `alit tokenize` would read of the same input.

    Raises:
        InputError: nothing was found, or it cannot be read.
        TrainingError: fewer photographs than a batch holds.
    """
    plan = make_plan(uri, rows_per_file=SLICE, image_column=image_column)
    return Feed(plan=plan, size=size, batch_size=batch_size, seed=seed, limits=limits)


def read_validation_images(uri: str, *, size: int, limit: int, image_column: str = "image") -> Tensor:
    """The first decodable images of an input, `limit` at limit, as inference sees them, uint8 [B, 3, S, S].

    Raises:
        InputError: nothing was found, or it cannot be read.
        TrainingError: none can be decoded.
    """
    found: list[np.ndarray] = []
    missing, why = limit, "none was asked for"
    for decoded in decode_plan(make_plan(uri, rows_per_file=SLICE, image_column=image_column), size, 64):
        found.append(decoded.pixels[:missing])
        missing -= len(found[-1])
        why = decoded.rejects[0][1] if decoded.rejects else why
        if not missing:
            break
    if missing == limit:
        raise TrainingError(f"no image of {uri!r} can be decoded: {why}")
    return to_tensor(np.concatenate(found))
