"""Work units of an evaluation: bytes to pixels to measurements, without Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from alit.images.formats import DEFAULT_LIMITS
from jobs.evaluation.models import EvaluationModels
from jobs.evaluation.options import EvaluationPaths
from jobs.evaluation.per_image import BatchMeasurements, RejectedImage, measure
from jobs.sources.decode import DECODE_THREADS, Decoded, decode_rows
from jobs.sources.prefetch import prefetch
from jobs.sources.read import read_rows
from jobs.sources.records import Plan, Row, Source

MAX_BATCHES_PER_UNIT = 8
"""With several batches, neighbouring rows of Parquet are read together."""
CODEC_IMAGES = 512
"""Number of images on which image codecs are measured, spread evenly over all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationJob:
    """What every worker needs; picklable.

    Attributes:
        source: The input's location and format.
        paths: The models to load.
        batch_size: Images measured together.
    """

    source: Source
    paths: EvaluationPaths
    batch_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkUnit:
    """Consecutive batches, measured by one worker.

    Attributes:
        first_batch: The number of the first batch.
        rows: The images.
        with_codecs: For each image, whether image codecs are measured on it.
    """

    first_batch: int
    rows: tuple[Row, ...]
    with_codecs: tuple[bool, ...]


def plan_rows(plan: Plan) -> list[Row]:
    """Returns all images of a plan."""
    rows = []
    for shard in plan.shards:
        if plan.source.sliced:
            rows += [Row(shard.paths[0], number) for number in range(shard.start, shard.start + shard.rows)]
        else:
            rows += [Row(path, 0) for path in shard.paths]
    return rows


def evenly_spaced(count: int, limit: int | None) -> np.ndarray:
    """Returns at most `limit` indices out of `count`, evenly spaced from the first on; all when None."""
    selected = count if limit is None else min(count, limit)
    return np.arange(selected) * count // max(1, selected)


def work_units(rows: Sequence[Row], batch_size: int, workers: int) -> list[WorkUnit]:
    """Cuts images into units of whole batches, at least two for every worker where there are enough batches."""
    with_codecs = np.zeros(len(rows), bool)
    with_codecs[evenly_spaced(len(rows), CODEC_IMAGES)] = True
    batches = math.ceil(len(rows) / batch_size)
    batches_per_unit = min(MAX_BATCHES_PER_UNIT, max(1, batches // (2 * workers)))
    units = []
    for first in range(0, batches, batches_per_unit):
        part = slice(first * batch_size, (first + batches_per_unit) * batch_size)
        unit = WorkUnit(first_batch=first, rows=tuple(rows[part]), with_codecs=tuple(with_codecs[part].tolist()))
        units.append(unit)
    return units


def measure_unit(job: EvaluationJob, models: EvaluationModels, unit: WorkUnit) -> Iterator[BatchMeasurements]:
    """Reads, decodes and measures a unit; the next batch is read while the current one is measured."""
    for offset, decoded in enumerate(_decode_ahead(job, unit, models.model.config.image_size)):
        start = offset * job.batch_size
        with_codecs = np.array(unit.with_codecs[start : start + job.batch_size])[decoded.good]
        measurements = measure(models, decoded.pixels, with_codecs) if len(decoded.pixels) else None
        bad = [name for name, good in zip(decoded.ids, decoded.good, strict=True) if not good]
        rejects = [RejectedImage(name, *why) for name, why in zip(bad, decoded.rejects, strict=True)]
        yield BatchMeasurements(unit.first_batch + offset, measurements, rejects)


def _decode_ahead(job: EvaluationJob, unit: WorkUnit, size: int) -> Iterator[Decoded]:
    # a unit of Parquet is read at once, since every read costs whole row groups
    rows_per_read = len(unit.rows) if job.source.sliced else job.batch_size
    with ThreadPoolExecutor(DECODE_THREADS) as pool:

        def decode() -> Iterator[Decoded]:
            for start in range(0, len(unit.rows), rows_per_read):
                rows = read_rows(job.source, unit.rows[start : start + rows_per_read], DEFAULT_LIMITS.max_bytes, pool)
                for part in rows.slices(job.batch_size):
                    yield decode_rows(part, size, DEFAULT_LIMITS, pool.map)

        yield from prefetch(decode(), 1)
