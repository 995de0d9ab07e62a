"""The training data feed in threads of this process, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from alit.training.trainer import Batch
from jobs.sources.decode import image_tensor
from jobs.sources.prefetch import prefetch
from jobs.training.crops import make_cropper, worker_share
from jobs.training.feed import Feed

AHEAD = 4
"""Steps that are read, or made, before they are asked for."""


def local_batches(
    feed: Feed, first_step: int, last_step: int, *, worker: int = 0, workers: int = 1, threads: int = 2
) -> Iterator[Batch]:
    """A worker's share of steps `first_step` to `last_step - 1`, decoded ahead in threads of this process, without Ray.

    The same, bit for bit, as `shared_batches` gives. Each worker reads the bytes of all shares.

    Raises:
        TrainingError: the batch cannot be shared equally, or none of a step's images can be decoded.
    """
    places, cropper, order = worker_share(feed.batch_size, worker, workers), make_cropper(feed), feed.order()
    with ThreadPoolExecutor(threads) as pool:
        crops = (
            pool.submit(cropper.crop, step, rows, places)
            for part in order.parts(first_step, last_step)
            for step, rows in cropper.read(part.first, feed.rows(order.images(part)))
        )
        for future in prefetch(crops, AHEAD):
            cropped = future.result()
            yield Batch(image_tensor(cropped.pixels), cropped.ids, cropped.rejects)
