"""The evaluation on Ray: units in, measurements out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch

from jobs.evaluation.models import Rulers
from jobs.evaluation.per_image import Measured, Part, Reject
from jobs.evaluation.units import Job, Unit, measure_unit, units
from jobs.runtime.process import keep_freed_memory, local_cpus
from jobs.runtime.session import ray_session, unwrapped
from jobs.sources.records import Row

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
        self.rulers = Rulers.load(job.files, local_device())

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        for row in rows.to_pylist():
            for part in measure_unit(self.job, self.rulers, _unit(row)):
                yield _part_table(part)


def local_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def parts_through_ray(job: Job, rows: Sequence[Row], workers: int | None) -> Iterator[Part]:
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
