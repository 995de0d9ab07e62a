"""The training data feed in threads of this process, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from alit.images.tensors import to_tensor
from alit.training.trainer import TrainingBatch
from jobs.sources.prefetch import prefetch
from jobs.training.crops import make_cropper, worker_share
from jobs.training.feed import Feed

AHEAD = 4
"""Steps that are prepared before they are needed."""


def local_batches(
    feed: Feed, first_step: int, last_step: int, *, worker: int = 0, workers: int = 1, threads: int = 2
) -> Iterator[TrainingBatch]:
    """Yields a worker's share of the batches, decoded ahead in threads of this process.

    The batches are those of `shared_batches`, bit for bit. Each worker reads the bytes of all shares.

    Args:
        feed: The training images.
        first_step: The first step.
        last_step: The step after the last one.
        worker: Number of the worker, from 0.
        workers: Number of workers.
        threads: Number of threads that decode.

    Raises:
        TrainingError: The batch cannot be divided equally, or none of a step's images can be decoded.
    """
    places, cropper, order = worker_share(feed.batch_size, worker, workers), make_cropper(feed), feed.order()
    with ThreadPoolExecutor(threads) as pool:
        crops = (
            pool.submit(cropper.crop, step, rows, places)
            for part in order.step_ranges(first_step, last_step)
            for step, rows in cropper.read(part.first, feed.rows(order.images(part)))
        )
        for future in prefetch(crops, AHEAD):
            cropped = future.result()
            yield TrainingBatch(to_tensor(cropped.pixels), cropped.ids, cropped.rejects)
