"""One unit of an evaluation: bytes to pixels to measurements, without Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from alit.images.formats import DEFAULT_LIMITS
from jobs.evaluation.models import RulerFiles, Rulers
from jobs.evaluation.per_image import Part, Reject, measure
from jobs.sources.decode import DECODE_THREADS, Decoded, decode_rows
from jobs.sources.read import read_rows
from jobs.sources.records import Plan, Row, Source

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
