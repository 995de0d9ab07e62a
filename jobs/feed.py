"""The training data feed: photographs from anywhere, in an order fixed by the seed (`alit.data`), cropped at random.

Ray Data makes the batches on CPUs anywhere in the cluster (`shared_batches`), or threads of this process do without Ray
(`local_batches`): the same ones, bit for bit, whoever makes them, for however many workers, from whichever step on. A
chunk of the order is what is read at once and what one of Ray's tasks does.

Shapes: B images of a step over all workers, b of one worker's share, S side in pixels.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from alit.data import Order, Part, crop_randomness, random_crop
from alit.errors import TrainingError
from alit.images import DEFAULT_LIMITS, ImageError, Limits
from alit.training import Batch
from jobs.inputs import Plan, Row, Rows, Source, make_plan
from jobs.reading import read_rows
from jobs.runner import quiet_ray_data, unwrapped
from jobs.shards import decoded_plan

T = TypeVar("T")

SLICE = 256
"""Neighbouring rows of Parquet that stay together in a chunk, at most."""
READERS = 16
"""Files that a task reads side by side: it waits for storage meanwhile."""
AHEAD = 4
"""Steps that are read, or made, before they are asked for."""
ROW_BYTES = 4 * 1024**2
"""Pixels of one worker that travel together, about: each of Ray's blocks costs some 20 ms of computing."""
SEGMENT = 256
"""Tasks per Ray dataset: starting one takes seconds, and so does naming all its images."""
PATIENCE = 600
"""Seconds to wait for images before giving up: a cluster may be starting machines."""


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
            raise TrainingError(f"batch_size {self.batch_size} is larger than the data: {self.plan.images} photographs")

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


def held_out(uri: str, *, size: int, most: int, image_column: str = "image") -> Tensor:
    """The first decodable images of an input, `most` at most, as inference sees them, uint8 [B, 3, S, S].

    Raises:
        InputError: nothing was found, or it cannot be read.
        TrainingError: none can be decoded.
    """
    found: list[np.ndarray] = []
    missing, why = most, "none was asked for"
    for decoded in decoded_plan(make_plan(uri, rows_per_file=SLICE, image_column=image_column), size, 64):
        found.append(decoded.pixels[:missing])
        missing -= len(found[-1])
        why = decoded.rejects[0][1] if decoded.rejects else why
        if not missing:
            break
    if missing == most:
        raise TrainingError(f"no image of {uri!r} can be decoded: {why}")
    return _images(np.concatenate(found))


# -------------------------------------------------------------------- pixels


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


def _cropper(feed: Feed) -> Cropper:
    source, limits = feed.plan.source, feed.limits
    return Cropper(source=source, size=feed.size, batch_size=feed.batch_size, seed=feed.seed, limits=limits)


def _share(batch_size: int, worker: int, workers: int) -> range:
    """The places of a step that are one worker's."""
    share, rest = divmod(batch_size, workers)
    if rest:
        raise TrainingError(
            f"batch_size {batch_size} cannot be shared equally by {workers} workers; "
            f"{workers * max(1, share)} or {workers * (share + 1)} can"
        )
    return range(worker * share, (worker + 1) * share)


def _images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _ahead(items: Iterator[T], count: int, patience: float | None = None) -> Iterator[T]:
    """The same items, of which the next ones are made in a thread meanwhile.

    Raises:
        TimeoutError: one was waited for longer than `patience` seconds.
    """
    thread = ThreadPoolExecutor(1)
    waiting = deque(thread.submit(next, items, None) for _ in range(count))
    try:
        while (item := waiting.popleft().result(patience)) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item
    finally:
        thread.shutdown(wait=patience is None, cancel_futures=True)


def local_batches(
    feed: Feed, first_step: int, last_step: int, *, worker: int = 0, workers: int = 1, threads: int = 2
) -> Iterator[Batch]:
    """A worker's share of steps `first_step` to `last_step - 1`, decoded ahead in threads of this process, without Ray.

    The same, bit for bit, as `shared_batches` gives. Each worker reads the bytes of all shares.

    Raises:
        TrainingError: the batch cannot be shared equally, or none of a step's images can be decoded.
    """
    places, cropper, order = _share(feed.batch_size, worker, workers), _cropper(feed), feed.order()
    with ThreadPoolExecutor(threads) as pool:
        crops = (
            pool.submit(cropper.crop, step, rows, places)
            for part in order.parts(first_step, last_step)
            for step, rows in cropper.read(part.first, feed.rows(order.images(part)))
        )
        for future in _ahead(crops, AHEAD):
            cropped = future.result()
            yield Batch(_images(cropped.pixels), cropped.ids, cropped.rejects)


# -------------------------------------------------------------------- Ray


@dataclass(frozen=True, slots=True)
class CropStage:
    """A task: rows that name the images of successive steps to rows of pixels, one per worker for every few steps."""

    cropper: Cropper
    workers: int
    steps_per_row: int

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        shares = [_share(self.cropper.batch_size, worker, self.workers) for worker in range(self.workers)]
        steps = (
            step
            for part in rows.to_pylist()
            for step in self.cropper.read(part["step"], list(map(Row, part["paths"], part["numbers"])))
        )
        steps = _ahead(steps, max(AHEAD, self.steps_per_row))
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


def _tasks(feed: Feed, first_step: int, last_step: int) -> list[list[Part]]:
    """The tasks of one Ray dataset that starts with a step: a chunk each, or several where the epochs are shorter."""
    tasks: list[list[Part]] = [[]]
    order = feed.order()
    for part in order.parts(first_step, last_step):
        if sum(part.last - part.first for part in tasks[-1]) >= order.steps_per_chunk / 2:
            if len(tasks) == SEGMENT:
                break
            tasks.append([])
        tasks[-1].append(part)
    return tasks


def ray_shares(feed: Feed, tasks: list[list[Part]], workers: int) -> list[Any]:
    """Ray Data's iterators over the rows of some tasks, one for each worker, to be consumed side by side."""
    import ray
    from ray.data import DataContext, ExecutionResources, TaskPoolStrategy

    quiet_ray_data()
    order = feed.order()
    step_bytes = 3 * feed.size**2 * feed.batch_size
    chunk_bytes = order.steps_per_chunk * step_bytes
    stage = CropStage(_cropper(feed), workers, max(1, ROW_BYTES * workers // step_bytes))
    resources = ray.cluster_resources()
    room = resources.get("object_store_memory", 0) / 2
    side_by_side = min(len(tasks), max(2, int(min(resources.get("CPU", 1), room / chunk_bytes))))
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # every row is a block of its own
    context.execution_no_progress_timeout_s = -1  # it would take a long validation for a hang; see PATIENCE
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


def _task_table(feed: Feed, order: Order, task: list[Part]) -> pa.Table:
    """One block, so one task: a row for each of its parts."""
    rows = []
    for part in task:
        images = feed.rows(order.images(part))
        rows.append({"step": part.first, "paths": [i.path for i in images], "numbers": [i.number for i in images]})
    return pa.Table.from_pylist(rows, PART_SCHEMA)


def _unwrapped_rows(batches: Any) -> Iterator[pa.Table]:
    with unwrapped(TrainingError):
        yield from _ahead(iter(batches), 1, PATIENCE)


def read_share(rows: Any, feed: Feed, tasks: list[list[Part]], *, worker: int, workers: int) -> Iterator[Batch]:
    """The batches of one of `ray_shares`."""
    shape = (-1, len(_share(feed.batch_size, worker, workers)), feed.size, feed.size, 3)
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
                yield Batch(_images(images.copy()), ids, told)  # a copy, as the shared memory is read-only
                step += 1
    except TimeoutError:
        raise TrainingError(
            f"no images for step {step} after {PATIENCE} s; Ray needs free CPUs to decode them, see `ray status`"
        ) from None
    if step != last_step:
        raise TrainingError(f"Ray Data ended before step {step}, {last_step - step} steps too early")


class Relay:
    """An actor that hands every worker its share.

    Train's broadcast would pickle the shares outside of Ray's sight, and their coordinators then never end.
    """

    def __init__(self, shares: list[Any]) -> None:
        self.shares = shares

    def share(self, worker: int) -> Any:
        return self.shares[worker]


def _handed_out(shares: list[Any] | None, worker: int) -> Any:
    """A worker's share of what worker 0 has made; all of them must ask."""
    import ray
    from ray.train.collective import barrier, broadcast_from_rank_zero

    name = uuid.uuid4().hex
    relay: Any = ray.remote(num_cpus=0)(Relay).options(name=name).remote(shares) if shares is not None else None
    name = broadcast_from_rank_zero(name)
    share = ray.get((relay or ray.get_actor(name)).share.remote(worker))
    barrier()  # the relay goes when everyone has its share
    return share


def _segments(feed: Feed, first_step: int, last_step: int) -> Iterator[list[list[Part]]]:
    while first_step < last_step:
        yield (tasks := _tasks(feed, first_step, last_step))
        first_step = tasks[-1][-1].last


def shared_batches(feed: Feed, first_step: int, last_step: int, *, worker: int, workers: int) -> Iterator[Batch]:
    """A worker's share of steps `first_step` to `last_step - 1`, decoded by Ray Data anywhere in the cluster.

    To be called by all workers of a Ray Train run, or by one process alone, in a session of Ray.

    Raises:
        TrainingError: the batch cannot be shared equally, or none of a step's images can be decoded.
    """
    _share(feed.batch_size, worker, workers)
    segments = _segments(feed, first_step, last_step)
    if worker == 0:  # the next one is made ready while the last one is used
        made = _ahead(((tasks, ray_shares(feed, tasks, workers)) for tasks in segments), 1)
    else:
        made = ((tasks, None) for tasks in segments)
    for tasks, shares in made:
        share = shares[0] if shares is not None and workers == 1 else _handed_out(shares, worker)
        yield from read_share(share, feed, tasks, worker=worker, workers=workers)
