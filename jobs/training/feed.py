"""The training data feed: images of any input, cropped at random, in an order that the seed fixes.

Ray Data decodes the batches on any CPU of the cluster (`shared_batches`), or threads of this process do so without Ray
(`local_batches`). The batches are equal bit for bit, whatever decodes them, whatever the number of workers and the
first step. A chunk of the order (`alit.training.data.Order`) is read at once, and is one task of Ray.

Shapes: B batch, S side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from alit.errors import TrainingError
from alit.images.formats import DEFAULT_LIMITS, Limits
from alit.images.tensors import to_tensor
from alit.training.data import Order
from alit.validation import require_range
from jobs.sources.decode import decode_plan
from jobs.sources.open import make_plan
from jobs.sources.records import Plan, Row

SLICE = 256
"""Maximum number of neighbouring Parquet rows that stay together in a chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """The training images and their order; picklable.

    Attributes:
        plan: The images; its shards are the slices that are permuted.
        size: Side of the crops in pixels.
        batch_size: Images per step, over all workers.
        seed: Seed of the order and of the crops.
        limits: Limits on the size of one image.

    Raises:
        TrainingError: A value is out of range, or a batch is larger than the data.
    """

    plan: Plan
    size: int
    batch_size: int
    seed: int
    limits: Limits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        for name, minimum in (("size", 1), ("batch_size", 1), ("seed", 0)):
            require_range(name, getattr(self, name), minimum, error=TrainingError)
        if self.batch_size > self.plan.images:
            raise TrainingError(f"batch_size {self.batch_size} is larger than the data: {self.plan.images} images")

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches; the remaining images, different ones in each epoch, are left out."""
        return self.plan.images // self.batch_size

    def order(self) -> Order:
        """Returns the order: image files are shuffled one by one, Parquet rows by slices and within chunks."""
        shards = self.plan.shards
        slices = [shard.rows for shard in shards] if self.plan.source.sliced else np.ones(self.plan.images, int)
        return Order(np.array(slices), self.batch_size, self.seed)

    def rows(self, images: np.ndarray) -> list[Row]:
        """Returns the locations of images.

        Args:
            images: Numbers of the images in the plan.
        """
        shards, ends = self.plan.shards, np.cumsum([shard.rows for shard in self.plan.shards])
        rows = []
        for image, number in zip(images.tolist(), np.searchsorted(ends, images, side="right").tolist(), strict=True):
            shard = shards[number]
            offset = image - int(ends[number]) + shard.rows
            sliced = self.plan.source.sliced
            rows.append(Row(shard.paths[0], shard.start + offset) if sliced else Row(shard.paths[offset], 0))
        return rows


def make_feed(
    uri: str, *, size: int, batch_size: int, seed: int, image_column: str = "image", limits: Limits = DEFAULT_LIMITS
) -> Feed:
    """Lists the images that `alit tokenize` would read from the same input.

    Args:
        uri: The input.
        size: Side of the crops in pixels.
        batch_size: Images per step, over all workers.
        seed: Seed of the order and of the crops.
        image_column: The Parquet column with the images.
        limits: Limits on the size of one image.

    Raises:
        InputError: The input is empty or cannot be read.
        TrainingError: A value is out of range, or a batch is larger than the data.
    """
    plan = make_plan(uri, rows_per_file=SLICE, image_column=image_column)
    return Feed(plan=plan, size=size, batch_size=batch_size, seed=seed, limits=limits)


def read_validation_images(uri: str, *, size: int, limit: int, image_column: str = "image") -> Tensor:
    """Returns the first decodable images of an input, preprocessed as for inference, uint8 [B, 3, S, S].

    Args:
        uri: The input.
        size: Side of the images in pixels.
        limit: Maximum number of images.
        image_column: The Parquet column with the images.

    Raises:
        InputError: The input is empty or cannot be read.
        TrainingError: No image can be decoded.
    """
    batches: list[np.ndarray] = []
    missing, reason = limit, "none was requested"
    for decoded in decode_plan(make_plan(uri, rows_per_file=SLICE, image_column=image_column), size, 64):
        batches.append(decoded.pixels[:missing])
        missing -= len(batches[-1])
        reason = decoded.rejects[0][1] if decoded.rejects else reason
        if not missing:
            break
    if missing == limit:
        raise TrainingError(f"no image of {uri!r} can be decoded: {reason}")
    return to_tensor(np.concatenate(batches))
