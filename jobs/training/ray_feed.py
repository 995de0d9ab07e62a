"""The training data feed on Ray Data, which decodes and crops images on any CPU of the cluster.

A chunk of the feed's order is read at once, and is one task of Ray.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from alit.errors import TrainingError
from alit.images.tensors import to_tensor
from alit.training.data import Order, StepRange
from alit.training.trainer import TrainingBatch
from jobs.runtime.session import quiet_ray_data, unwrapped
from jobs.sources.prefetch import prefetch
from jobs.sources.records import Row
from jobs.training.crops import Cropped, Cropper, make_cropper, worker_share
from jobs.training.feed import Feed
from jobs.training.local_feed import AHEAD

ROW_BYTES = 4 * 1024**2
"""Approximate size of the pixels that one worker receives at once; each block costs Ray some 20 ms of computing."""


SEGMENT = 256
"""Tasks per Ray dataset; starting a dataset takes seconds, and so does listing all its images."""


IMAGE_TIMEOUT = 600
"""Seconds to wait for images before giving up: a cluster may be starting machines."""


@dataclass(frozen=True, slots=True)
class CropStage:
    """Maps rows that name the images of successive steps to rows of pixels, one per worker for every few steps.

    Attributes:
        cropper: Reads and crops the images.
        workers: Number of workers that train.
        steps_per_row: Number of steps in a row of pixels.
    """

    cropper: Cropper
    workers: int
    steps_per_row: int

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Yields tables of one row each; the rows of a few steps are in the order of the workers."""
        shares = [worker_share(self.cropper.batch_size, worker, self.workers) for worker in range(self.workers)]
        steps = (
            step
            for part in rows.to_pylist()
            for step in self.cropper.read(part["step"], list(map(Row, part["paths"], part["numbers"])))
        )
        steps = prefetch(steps, max(AHEAD, self.steps_per_row))
        while run := list(islice(steps, self.steps_per_row)):
            for worker, share in enumerate(shares):
                yield _row(run[0][0], worker, [self.cropper.crop(step, data, share) for step, data in run])


PART_SCHEMA = pa.schema({"step": pa.int64(), "paths": pa.list_(pa.binary()), "numbers": pa.list_(pa.int64())})


_REJECTS = pa.list_(pa.list_(pa.struct({"id": pa.string(), "reason": pa.string(), "message": pa.string()})))


def _row(step: int, worker: int, run: list[Cropped]) -> pa.Table:
    """Returns the crops of a few steps as one cell, which Ray Data never splits."""
    pixels = np.stack([cropped.pixels for cropped in run])
    ends = np.array([0, pixels.size])
    cell = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(pixels)])
    rejects = [[dict(zip(("id", "reason", "message"), r, strict=True)) for r in cropped.rejects] for cropped in run]
    return pa.table(
        {
            "step": pa.array([step], pa.int64()),
            "worker": pa.array([worker], pa.int64()),
            "pixels": cell,
            "ids": pa.array([[cropped.ids for cropped in run]], pa.list_(pa.list_(pa.string()))),
            "rejects": pa.array([rejects], _REJECTS),
        }
    )


def _tasks(feed: Feed, first_step: int, last_step: int) -> list[list[StepRange]]:
    """Returns the tasks of the Ray dataset that starts at a step: one chunk each, or several if epochs are shorter."""
    tasks: list[list[StepRange]] = [[]]
    order = feed.order()
    for part in order.step_ranges(first_step, last_step):
        if sum(part.last - part.first for part in tasks[-1]) >= order.steps_per_chunk / 2:
            if len(tasks) == SEGMENT:
                break
            tasks.append([])
        tasks[-1].append(part)
    return tasks


def ray_shares(feed: Feed, tasks: list[list[StepRange]], workers: int) -> list[Any]:
    """Returns Ray Data's iterators over the rows of tasks, one per worker, which must be consumed concurrently."""
    import ray
    from ray.data import DataContext, ExecutionResources, TaskPoolStrategy

    quiet_ray_data()
    order = feed.order()
    step_bytes = 3 * feed.size**2 * feed.batch_size
    chunk_bytes = order.steps_per_chunk * step_bytes
    stage = CropStage(make_cropper(feed), workers, max(1, ROW_BYTES * workers // step_bytes))
    resources = ray.cluster_resources()
    memory = resources.get("object_store_memory", 0) / 2
    concurrency = min(len(tasks), max(2, int(min(resources.get("CPU", 1), memory / chunk_bytes))))
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # every row is a block of its own
    context.execution_no_progress_timeout_s = -1  # a long validation is no hang; see IMAGE_TIMEOUT
    context.execution_options.preserve_order = True  # the split then also assigns the rows to the workers in turn
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=min(memory, 2 * concurrency * chunk_bytes)
    )
    with DataContext.current(context):
        dataset = ray.data.from_arrow([_task_table(feed, order, task) for task in tasks]).map_batches(
            stage,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0.25,  # they fit beside training workers; there are never more than CPUs
            compute=TaskPoolStrategy(size=concurrency),
        )
        return [dataset.iterator()] if workers == 1 else dataset.streaming_split(workers, equal=False)


def _task_table(feed: Feed, order: Order, task: list[StepRange]) -> pa.Table:
    """Returns one block, which becomes one task, with a row for each of its step ranges."""
    rows = []
    for part in task:
        images = feed.rows(order.images(part))
        rows.append({"step": part.first, "paths": [i.path for i in images], "numbers": [i.number for i in images]})
    return pa.Table.from_pylist(rows, PART_SCHEMA)


def _unwrapped_rows(batches: Any) -> Iterator[pa.Table]:
    with unwrapped(TrainingError):
        yield from prefetch(iter(batches), 1, IMAGE_TIMEOUT)


def read_share(
    rows: Any, feed: Feed, tasks: list[list[StepRange]], *, worker: int, workers: int
) -> Iterator[TrainingBatch]:
    """Yields the batches of one of the iterators of `ray_shares`.

    Raises:
        TrainingError: Ray Data returns no images in time, or those of other steps, or none of a step can be decoded.
    """
    shape = (-1, len(worker_share(feed.batch_size, worker, workers)), feed.size, feed.size, 3)
    step, last_step = tasks[0][0].first, tasks[-1][-1].last
    batches = rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    try:
        for row in _unwrapped_rows(batches):
            actual = row["step"][0].as_py(), row["worker"][0].as_py(), len(row)
            if actual != (step, worker, 1):
                raise TrainingError(f"Ray Data gave worker {worker} {actual} as (step, worker, rows) at step {step}")
            pixels = np.frombuffer(row["pixels"][0].as_buffer(), np.uint8).reshape(shape)
            for images, ids, rejects in zip(pixels, row["ids"][0].as_py(), row["rejects"][0].as_py(), strict=True):
                reasons = [(r["id"], r["reason"], r["message"]) for r in rejects]
                yield TrainingBatch(to_tensor(images.copy()), ids, reasons)  # a copy, as shared memory is read-only
                step += 1
    except TimeoutError:
        raise TrainingError(
            f"no images for step {step} after {IMAGE_TIMEOUT} s; Ray needs free CPUs to decode them, see `ray status`"
        ) from None
    if step != last_step:
        raise TrainingError(f"Ray Data ended before step {step}, {last_step - step} steps too early")


class IteratorRegistry:
    """An actor from which every worker fetches its iterator.

    Ray Train's broadcast would pickle the iterators without Ray's knowledge, and their coordinators would never end.

    Args:
        shares: The iterators of `ray_shares`, by worker.
    """

    def __init__(self, shares: list[Any]) -> None:
        self.shares = shares

    def share(self, worker: int) -> Any:
        """Returns the iterator of a worker."""
        return self.shares[worker]


def _fetch_share(shares: list[Any] | None, worker: int) -> Any:
    """Returns the iterator of a worker out of those that worker 0 has created; every worker must call it."""
    import ray
    from ray.train.collective import barrier, broadcast_from_rank_zero

    name = uuid.uuid4().hex
    registry: Any = (
        ray.remote(num_cpus=0)(IteratorRegistry).options(name=name).remote(shares) if shares is not None else None
    )
    name = broadcast_from_rank_zero(name)
    share = ray.get((registry or ray.get_actor(name)).share.remote(worker))
    barrier()  # the registry is deleted on return, so every worker must have its share by now
    return share


def _segments(feed: Feed, first_step: int, last_step: int) -> Iterator[list[list[StepRange]]]:
    while first_step < last_step:
        yield (tasks := _tasks(feed, first_step, last_step))
        first_step = tasks[-1][-1].last


def shared_batches(
    feed: Feed, first_step: int, last_step: int, *, worker: int, workers: int
) -> Iterator[TrainingBatch]:
    """Yields a worker's share of the batches, decoded by Ray Data anywhere in the cluster.

    All workers of a Ray Train run must call it, or one process alone, in a session of Ray.

    Args:
        feed: The training images.
        first_step: The first step.
        last_step: The step after the last one.
        worker: Number of the worker, from 0.
        workers: Number of workers.

    Raises:
        TrainingError: The batch cannot be divided equally, or none of a step's images can be decoded.
    """
    worker_share(feed.batch_size, worker, workers)
    segments = _segments(feed, first_step, last_step)
    if worker == 0:  # the next dataset is prepared while the current one is read
        segments_with_shares = prefetch(((tasks, ray_shares(feed, tasks, workers)) for tasks in segments), 1)
    else:
        segments_with_shares = ((tasks, None) for tasks in segments)
    for tasks, shares in segments_with_shares:
        share = shares[0] if shares is not None and workers == 1 else _fetch_share(shares, worker)
        yield from read_share(share, feed, tasks, worker=worker, workers=workers)
