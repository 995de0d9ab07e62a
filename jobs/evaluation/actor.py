"""The evaluation on Ray: an actor that measures work units, and their transport as Arrow tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch

from jobs.evaluation.models import EvaluationModels, local_device
from jobs.evaluation.per_image import BatchMeasurements, Measurements, RejectedImage
from jobs.evaluation.units import EvaluationJob, WorkUnit, measure_unit, work_units
from jobs.runtime.process import keep_freed_memory
from jobs.runtime.resources import resolve_workers, session_resources
from jobs.runtime.session import ray_session, unwrapped
from jobs.sources.records import Row

UNIT_SCHEMA = pa.schema(
    {
        "first_batch": pa.int64(),
        "paths": pa.list_(pa.binary()),
        "numbers": pa.list_(pa.int64()),
        "with_codecs": pa.list_(pa.bool_()),
    }
)


def _unit_to_table(unit: WorkUnit) -> pa.Table:
    paths, numbers = zip(*unit.rows, strict=True)
    row = {
        "first_batch": unit.first_batch,
        "paths": list(paths),
        "numbers": list(numbers),
        "with_codecs": list(unit.with_codecs),
    }
    return pa.Table.from_pylist([row], UNIT_SCHEMA)


def _unit_from_row(row: dict[str, Any]) -> WorkUnit:
    rows = tuple(map(Row, row["paths"], row["numbers"]))
    return WorkUnit(first_batch=row["first_batch"], rows=rows, with_codecs=tuple(row["with_codecs"]))


def _batch_to_table(batch: BatchMeasurements) -> pa.Table:
    packed = None if batch.measurements is None else batch.measurements.pack()
    columns = {"number": [batch.number], "rejects": [json.dumps(batch.rejects)]}
    return pa.table(columns | {"measurements": pa.array([packed], pa.large_binary())})


def _batch_from_row(row: dict[str, Any]) -> BatchMeasurements:
    packed = row["measurements"]
    measurements = None if packed is None else Measurements.unpack(packed)
    return BatchMeasurements(row["number"], measurements, [RejectedImage(*r) for r in json.loads(row["rejects"])])


class Evaluator:
    """An actor that loads the models once, then measures one unit after the other."""

    def __init__(self, job: EvaluationJob) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        self.job = job
        self.models = EvaluationModels.load(job.paths, local_device())

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Measures the units in a table, one output row per batch."""
        for row in rows.to_pylist():
            for batch in measure_unit(self.job, self.models, _unit_from_row(row)):
                yield _batch_to_table(batch)


def measure_on_ray(job: EvaluationJob, rows: Sequence[Row], workers: int | None) -> Iterator[BatchMeasurements]:
    """Measures images in actors, in any order of the batches.

    Args:
        job: What every worker needs.
        rows: The images.
        workers: Number of actors; one per GPU or, without GPUs, per CPU when None.

    Raises:
        AlitError: A worker raised it.
    """
    with ray_session(workers or 0) as ray:
        resolved = resolve_workers(session_resources(ray), tasks=len(rows), workers=workers)
        units = work_units(rows, job.batch_size, resolved.count)
        dataset = ray.data.from_arrow([_unit_to_table(unit) for unit in units]).map_batches(
            Evaluator,
            fn_constructor_args=(job,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(resolved.count, len(units)), max_tasks_in_flight_per_actor=2),
            num_cpus=resolved.requirements["CPU"],
            num_gpus=resolved.gpus or None,
        )
        with unwrapped():
            yield from map(_batch_from_row, dataset.iter_rows())
