"""The training data feed on Ray Data: crops made on any CPU of the cluster.

A chunk of the feed's order is what is read at once and what one Ray task does.
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
"""Pixels of one worker that travel together, about: each of Ray's blocks costs some 20 ms of computing."""


SEGMENT = 256
"""Tasks per Ray dataset: starting one takes seconds, and so does naming all its images."""


IMAGE_TIMEOUT = 600
"""Seconds to wait for images before giving up: a cluster may be starting machines."""


@dataclass(frozen=True, slots=True)
class CropStage:
    """A task: rows that name the images of successive steps to rows of pixels, one per worker for every few steps."""

    cropper: Cropper
    workers: int
    steps_per_row: int

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
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
    """The crops of some steps as one cell, which Ray Data never splits."""
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
    """The tasks of one Ray dataset that starts with a step: a chunk each, or several where the epochs are shorter."""
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
    """Ray Data's iterators over the rows of some tasks, one for each worker, to be consumed side by side."""
    import ray
    from ray.data import DataContext, ExecutionResources, TaskPoolStrategy

    quiet_ray_data()
    order = feed.order()
    step_bytes = 3 * feed.size**2 * feed.batch_size
    chunk_bytes = order.steps_per_chunk * step_bytes
    stage = CropStage(make_cropper(feed), workers, max(1, ROW_BYTES * workers // step_bytes))
    resources = ray.cluster_resources()
    room = resources.get("object_store_memory", 0) / 2
    side_by_side = min(len(tasks), max(2, int(min(resources.get("CPU", 1), room / chunk_bytes))))
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # every row is a block of its own
    context.execution_no_progress_timeout_s = -1  # it would take a long validation for a hang; see IMAGE_TIMEOUT
    context.execution_options.preserve_order = True  # which also makes the split go round the workers, row by row
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=min(room, 2 * side_by_side * chunk_bytes)
    )
    with DataContext.current(context):
        dataset = ray.data.from_arrow([_task_table(feed, order, task) for task in tasks]).map_batches(
            stage,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0.25,  # so that they find room beside training workers; they are no more than there are CPUs
            compute=TaskPoolStrategy(size=side_by_side),
        )
        return [dataset.iterator()] if workers == 1 else dataset.streaming_split(workers, equal=False)


def _task_table(feed: Feed, order: Order, task: list[StepRange]) -> pa.Table:
    """One block, so one task: a row for each of its parts."""
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
    """The batches of one of `ray_shares`."""
    shape = (-1, len(worker_share(feed.batch_size, worker, workers)), feed.size, feed.size, 3)
    step, last_step = tasks[0][0].first, tasks[-1][-1].last
    batches = rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    try:
        for row in _unwrapped_rows(batches):
            found = row["step"][0].as_py(), row["worker"][0].as_py(), len(row)
            if found != (step, worker, 1):
                raise TrainingError(f"Ray Data gave worker {worker} {found} as (step, worker, rows) at step {step}")
            pixels = np.frombuffer(row["pixels"][0].as_buffer(), np.uint8).reshape(shape)
            for images, ids, rejects in zip(pixels, row["ids"][0].as_py(), row["rejects"][0].as_py(), strict=True):
                told = [(r["id"], r["reason"], r["message"]) for r in rejects]
                yield TrainingBatch(to_tensor(images.copy()), ids, told)  # a copy, as the shared memory is read-only
                step += 1
    except TimeoutError:
        raise TrainingError(
            f"no images for step {step} after {IMAGE_TIMEOUT} s; Ray needs free CPUs to decode them, see `ray status`"
        ) from None
    if step != last_step:
        raise TrainingError(f"Ray Data ended before step {step}, {last_step - step} steps too early")


class IteratorRegistry:
    """An actor that hands every worker its share.

    Train's broadcast would pickle the shares outside of Ray's sight, and their coordinators then never end.
    """

    def __init__(self, shares: list[Any]) -> None:
        self.shares = shares

    def share(self, worker: int) -> Any:
        return self.shares[worker]


def _fetch_share(shares: list[Any] | None, worker: int) -> Any:
    """A worker's share of what worker 0 has made; all of them must ask."""
    import ray
    from ray.train.collective import barrier, broadcast_from_rank_zero

    name = uuid.uuid4().hex
    relay: Any = (
        ray.remote(num_cpus=0)(IteratorRegistry).options(name=name).remote(shares) if shares is not None else None
    )
    name = broadcast_from_rank_zero(name)
    share = ray.get((relay or ray.get_actor(name)).share.remote(worker))
    barrier()  # the relay goes when everyone has its share
    return share


def _segments(feed: Feed, first_step: int, last_step: int) -> Iterator[list[list[StepRange]]]:
    while first_step < last_step:
        yield (tasks := _tasks(feed, first_step, last_step))
        first_step = tasks[-1][-1].last


def shared_batches(
    feed: Feed, first_step: int, last_step: int, *, worker: int, workers: int
) -> Iterator[TrainingBatch]:
    """A worker's share of steps `first_step` to `last_step - 1`, decoded by Ray Data anywhere in the cluster.

    To be called by all workers of a Ray Train run, or by one process alone, in a session of Ray.

    Raises:
        TrainingError: the batch cannot be shared equally, or none of a step's images can be decoded.
    """
    worker_share(feed.batch_size, worker, workers)
    segments = _segments(feed, first_step, last_step)
    if worker == 0:  # the next one is made ready while the last one is used
        made = prefetch(((tasks, ray_shares(feed, tasks, workers)) for tasks in segments), 1)
    else:
        made = ((tasks, None) for tasks in segments)
    for tasks, shares in made:
        share = shares[0] if shares is not None and workers == 1 else _fetch_share(shares, worker)
        yield from read_share(share, feed, tasks, worker=worker, workers=workers)
