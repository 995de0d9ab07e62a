"""What weights are worth: every image measured at every length, in one streaming pass of Ray Data.

One row of the Ray dataset is a run of batches; actors hold the models, read, decode and measure, and send small numbers
back, batch by batch. The batches do not depend on how many actors there are, and neither do the numbers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console

from alit.errors import AlitError
from alit.images import DEFAULT_LIMITS
from jobs.inputs import Plan, Row, Source, make_plan
from jobs.plot import draw
from jobs.progress import job_bar
from jobs.reading import read_rows
from jobs.report import Evaluation, report, require_thresholds
from jobs.runner import keep_freed_memory, local_cpus, ray_session, unwrapped
from jobs.samples import Collected, Measured, Part, Reject, RulerFiles, Rulers, measure
from jobs.shards import DECODE_THREADS, Decoded, decode_rows
from jobs.storage import place
from jobs.tables import markdown

LARGEST_BATCH = 64
PIXELS = 1 << 20
"""Of a batch, at most: LPIPS's first layers alone take half a KiB for each."""
BATCHES_PER_UNIT = 8
"""At most; neighbouring rows of Parquet are then read together."""
CODED = 512
"""Images that the codecs are tried on, spread evenly over all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """All that a worker needs to know; picklable.

    Attributes:
        source: where the input lies and how it is read.
        files: what to measure, and with what.
        batch_size: images measured together.
    """

    source: Source
    files: RulerFiles
    batch_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A run of batches, for one worker.

    Attributes:
        first: the number of its first batch.
        rows: its images.
        coded: on which of them the codecs are tried.
    """

    first: int
    rows: tuple[Row, ...]
    coded: tuple[bool, ...]


# -------------------------------------------------------------------- pure stages


def evaluate(rulers: Rulers, batches: Iterable[np.ndarray], thresholds: Sequence[float] = ()) -> Evaluation:
    """Evaluates a model on images in memory, uint8 [B, S, S, 3] each; the codecs are tried on all of them.

    Args:
        rulers: the model, and what else there is to measure with.
        batches: of any sizes, at least one image each.
        thresholds: of the criterion `l1`; some that spread the lengths when none are given.

    Raises:
        AlitError: no images, or a threshold is not a positive number.
    """
    require_thresholds(thresholds)
    collected = Collected()
    for number, pixels in enumerate(batches):
        collected.add(Part(number, measure(rulers, pixels, np.ones(len(pixels), bool)), []))
    return report(collected, rulers, thresholds)


def every_row(plan: Plan) -> list[Row]:
    """All images of a plan."""
    rows = []
    for shard in plan.shards:
        if plan.source.sliced:
            rows += [Row(shard.paths[0], number) for number in range(shard.start, shard.start + shard.rows)]
        else:
            rows += [Row(path, 0) for path in shard.paths]
    return rows


def spread(count: int, most: int | None) -> np.ndarray:
    """The indices of at most `most` out of `count`, evenly spaced from the first on."""
    kept = count if most is None else min(count, most)
    return np.arange(kept) * count // max(1, kept)


def units(rows: Sequence[Row], batch_size: int, workers: int) -> list[Unit]:
    """Cuts images into runs of whole batches, at least two for every worker where there are enough."""
    coded = np.zeros(len(rows), bool)
    coded[spread(len(rows), CODED)] = True
    batches = math.ceil(len(rows) / batch_size)
    together = min(BATCHES_PER_UNIT, max(1, batches // (2 * workers)))
    found = []
    for first in range(0, batches, together):
        part = slice(first * batch_size, (first + together) * batch_size)
        found.append(Unit(first=first, rows=tuple(rows[part]), coded=tuple(coded[part].tolist())))
    return found


def measure_unit(job: Job, rulers: Rulers, unit: Unit) -> Iterator[Part]:
    """Reads, decodes and measures; the next images are read while the last ones are measured."""
    for offset, decoded in enumerate(_decoded(job, unit, rulers.model.config.image_size)):
        start = offset * job.batch_size
        coded = np.array(unit.coded[start : start + job.batch_size])[decoded.good]
        measured = measure(rulers, decoded.pixels, coded) if len(decoded.pixels) else None
        bad = [name for name, good in zip(decoded.ids, decoded.good, strict=True) if not good]
        rejects = [Reject(name, *why) for name, why in zip(bad, decoded.rejects, strict=True)]
        yield Part(unit.first + offset, measured, rejects)


def _decoded(job: Job, unit: Unit, size: int) -> Iterator[Decoded]:
    # of Parquet a unit is read at once, since every reading costs whole row groups
    together = len(unit.rows) if job.source.sliced else job.batch_size
    with ThreadPoolExecutor(DECODE_THREADS) as pool, ThreadPoolExecutor(1) as ahead:

        def decode() -> Iterator[Decoded]:
            for start in range(0, len(unit.rows), together):
                rows = read_rows(job.source, unit.rows[start : start + together], DEFAULT_LIMITS.max_bytes, pool)
                for part in rows.slices(job.batch_size):
                    yield decode_rows(part, size, DEFAULT_LIMITS, pool.map)

        parts = decode()
        waiting: Future[Decoded | None] = ahead.submit(next, parts, None)
        while (decoded := waiting.result()) is not None:
            waiting = ahead.submit(next, parts, None)
            yield decoded


# -------------------------------------------------------------------- Ray stages


UNIT_SCHEMA = pa.schema(
    {
        "first": pa.int64(),
        "paths": pa.list_(pa.binary()),
        "numbers": pa.list_(pa.int64()),
        "coded": pa.list_(pa.bool_()),
    }
)


def _unit_table(unit: Unit) -> pa.Table:
    paths, numbers = zip(*unit.rows, strict=True)
    columns = {"first": unit.first, "paths": list(paths), "numbers": list(numbers), "coded": list(unit.coded)}
    return pa.Table.from_pylist([columns], UNIT_SCHEMA)


def _unit(row: dict[str, Any]) -> Unit:
    rows = tuple(map(Row, row["paths"], row["numbers"]))
    return Unit(first=row["first"], rows=rows, coded=tuple(row["coded"]))


def _part_table(part: Part) -> pa.Table:
    cell = None if part.measured is None else part.measured.pack()
    columns = {"number": [part.number], "rejects": [json.dumps(part.rejects)]}
    return pa.table(columns | {"measured": pa.array([cell], pa.large_binary())})


def _part(row: dict[str, Any]) -> Part:
    measured = None if row["measured"] is None else Measured.unpack(row["measured"])
    return Part(row["number"], measured, [Reject(*reject) for reject in json.loads(row["rejects"])])


class Evaluator:
    """The actor: loads the models once, then measures one unit after the other."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        self.job = job
        self.rulers = Rulers.load(job.files, _device())

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        for row in rows.to_pylist():
            for part in measure_unit(self.job, self.rulers, _unit(row)):
                yield _part_table(part)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _through_ray(job: Job, rows: Sequence[Row], workers: int | None) -> Iterator[Part]:
    with ray_session(workers or 0) as ray:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = workers or gpus or local_cpus()
        work = units(rows, job.batch_size, count)
        dataset = ray.data.from_arrow([_unit_table(unit) for unit in work]).map_batches(
            Evaluator,
            fn_constructor_args=(job,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(count, len(work)), max_tasks_in_flight_per_actor=2),
            num_cpus=0.5 if gpus else 1,
            num_gpus=1 if gpus else None,
        )
        with unwrapped():
            yield from map(_part, dataset.iter_rows())


# -------------------------------------------------------------------- the command


def run(
    source: str,
    output: str | None = None,
    *,
    weights: str | None = None,
    against: str | None = None,
    thresholds: Sequence[float] = (),
    vgg: str | None = None,
    lpips: str | None = None,
    inception: str | None = None,
    workers: int | None = None,
    most: int | None = None,
    image_column: str = "image",
    ray: bool = True,
    console: Console | None = None,
) -> Evaluation:
    """Evaluates a weights folder and prints the tables; the arguments are those of `alit evaluate`.

    Raises:
        AlitError: whatever a person can put right, before anything is measured; or no image could be decoded.
    """
    for option, value in (("--workers", workers), ("--most", most)):
        if value is not None and value < 1:
            raise AlitError(f"{option} must be at least 1, got {value}")
    require_thresholds(thresholds)
    console = console or Console(stderr=True)
    given = RulerFiles(weights=weights, against=against, vgg=vgg, lpips=lpips, inception=inception)
    rulers = Rulers.load(given, "cpu" if ray else _device())  # here too: what is wrong costs a sentence, not a start
    plan = make_plan(source, rows_per_file=1024, image_column=image_column)
    target = place(output) if output is not None else None
    rows = every_row(plan)
    rows = [rows[index] for index in spread(len(rows), most)]
    size = rulers.model.config.image_size
    batch_size = max(1, min(LARGEST_BATCH, PIXELS // size**2))
    job = Job(source=plan.source, files=given.absolute(), batch_size=batch_size)
    console.print(f"{len(rows)} of {plan.images} images, at {len(rulers.model.config.lengths)} lengths")
    if ray:
        parts = _through_ray(job, rows, workers)
    else:
        parts = (part for unit in units(rows, batch_size, 1) for part in measure_unit(job, rulers, unit))
    result = report(_follow(parts, len(rows), console), rulers, thresholds)
    print(markdown(result))
    if target is not None:
        for ending, data in (
            (".json", (json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n").encode()),
            (".md", markdown(result).encode()),
            (".png", draw(result, "png")),
            (".svg", draw(result, "svg")),
        ):
            target.with_suffix(ending).write(data)
    return result


def _follow(parts: Iterable[Part], images: int, console: Console) -> Collected:
    """Gathers all parts, showing how far it is."""
    collected, started, before = Collected(), 0.0, 0
    with job_bar(console) as bar:
        task = bar.add_task("starting", total=images, rate="")
        for part in parts:
            collected.add(part)
            if not started:  # what came before took a start besides
                started, before = time.monotonic(), collected.through
            rate = (collected.through - before) / max(1e-9, time.monotonic() - started)
            text = f"{rate:.1f} images/s" if rate else ""
            bar.update(task, description="measuring", completed=collected.through, rate=text)
    return collected
