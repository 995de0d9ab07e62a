"""The plan of a dataset: the images of every shard, written once into the dataset and read by every worker.

`_plan/*.parquet` has one row per shard, in order; every file but the last has the same number of rows. Neither the
driver nor a worker ever holds more than one of these files in memory.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alit.validation import require
from jobs.dataset.unique_ids import IdFile, check_ids, pc
from jobs.sources.columnar import READ_ERRORS, ColumnarFile, open_table
from jobs.sources.records import Input, InputError, Shard, Source, readable
from jobs.storage.path import StoragePath
from jobs.storage.retry import StorageError, reason

PLAN = "_plan"

KEPT = "kept"
"""Column of the kept columns of a list, one struct per image; for tables it is null and only its type matters."""

NAMES_PER_FILE = 1 << 16
"""Approximate number of image names in one file of the plan."""

SHARDS_PER_FILE = 1 << 10
"""Shards in one file of the plan, where shards have no image names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPlan:
    """A handle to the plan that is stored in a dataset; small and picklable.

    Attributes:
        folder: The dataset's folder.
        source: The input and how its shards are read.
        shards: Number of shards.
        images: Number of images in all shards; None for tars, which have no index.
        per_file: Shards in each of the plan's files.
        rows_per_file: Maximum number of images in a shard.
    """

    folder: StoragePath
    source: Source
    shards: int
    images: int | None
    per_file: int
    rows_per_file: int

    def shard(self, number: int) -> Shard:
        """Reads the description of one shard.

        Raises:
            StorageError: The plan cannot be read.
        """
        file, row = divmod(number, self.per_file)
        with _part(self.folder, file) as part:
            table = part.read(part.schema.names, row, 1)
        cells = {name: table.column(name)[0].as_py() for name in ("number", "ids", "paths", "start", "rows")}
        assert cells["number"] == number, (cells["number"], number)
        kept = None
        if self.source.kind == "links" and self.source.kept:
            structs = table.column(KEPT).combine_chunks().flatten()
            kept = pa.Table.from_arrays(structs.flatten(), schema=pa.schema(self.source.kept))
        return Shard(**cells | {"ids": tuple(cells["ids"]), "paths": tuple(cells["paths"]), "kept": kept})

    def ids(self, number: int) -> list[str] | None:
        """Returns the ids that a shard's files must hold; None where only the input has them."""
        shard = self.shard(number)
        if self.source.kind == "tar" or (self.source.id_column and self.source.kind == "table"):
            return None
        if self.source.kind == "table":
            label = readable(shard.paths[0])
            return [f"{label}#{row}" for row in range(shard.start, shard.start + shard.rows)]
        return list(shard.ids)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan's entry in `_job.json`; the kept columns' types are in the plan's files."""
        return {
            "kind": self.source.kind,
            "root": self.source.root.path,
            "links": self.source.links,
            "shards": self.shards,
            "images": self.images,
            "per_file": self.per_file,
        }


@contextmanager
def _part(folder: StoragePath, number: int) -> Iterator[ColumnarFile]:
    """Opens one of the plan's files; not cached, as cached functions cannot be pickled by value for workers."""
    try:
        with open_table(folder / PLAN, _file_name(number).encode()) as part:
            yield part
    except READ_ERRORS as error:
        path = folder / PLAN / _file_name(number)
        raise StorageError(f"the dataset's plan cannot be read: {path.path!r}: {reason(error)}") from error


def _file_name(number: int) -> str:
    return f"{number:06d}.parquet"


def _schema(kept: Iterable[pa.Field]) -> pa.Schema:
    return pa.schema(
        {
            "number": pa.int64(),
            "ids": pa.list_(pa.string()),
            "paths": pa.list_(pa.binary()),
            "start": pa.int64(),
            "rows": pa.int64(),
        }
        | ({KEPT: pa.list_(pa.struct(fields))} if (fields := list(kept)) else {})  # Parquet has no empty structs
    )


def write_plan(
    folder: StoragePath,
    opened: Input,
    rows_per_file: int,
    limit: int | None,
    report: Callable[[int], None] | None = None,
) -> StoredPlan:
    """Lists an input and writes its shards into a dataset's plan.

    Args:
        folder: The dataset's folder.
        opened: The input.
        rows_per_file: Maximum number of images in a shard.
        limit: Maximum number of images to plan; None for all.
        report: Called with the number of images listed so far.

    Raises:
        InputError: The input cannot be listed, has duplicate or empty ids, or is made of tars and has a limit.
        StorageError: The plan cannot be written.
    """
    source = opened.source
    listed = source.kind in ("files", "links")
    per_file = max(1, NAMES_PER_FILE // rows_per_file) if listed else SHARDS_PER_FILE
    require_countable(source, limit)
    shards = opened.shards if limit is None else limited(opened.shards, limit)
    schema = _schema(source.kept)
    count = images = 0
    escaped = False
    for part in itertools.count():
        rows = list(itertools.islice(shards, per_file))
        if not rows and part:
            break
        sink = io.BytesIO()
        table = pa.concat_tables([_row(shard, schema) for shard in rows] or [schema.empty_table()])
        group = 1 if listed else per_file
        pq.write_table(table, sink, compression="zstd", row_group_size=group, use_dictionary=False)
        (folder / PLAN / _file_name(part)).write(sink.getvalue())
        count, images = count + len(rows), images + sum(shard.rows for shard in rows)
        escaped |= source.kind == "files" and any(_escaped(shard) for shard in rows)
        if report is not None:
            report(images)
        if len(rows) < per_file:
            break
    total = None if source.kind == "tar" else images
    plan = StoredPlan(
        folder=folder, source=source, shards=count, images=total, per_file=per_file, rows_per_file=rows_per_file
    )
    if escaped or source.kind == "links" or (source.kind == "table" and source.id_column):
        _require_unique_ids(plan)
        pa.default_memory_pool().release_unused()  # memory of the ids
    return plan


def _escaped(shard: Shard) -> bool:
    """Returns whether a name is not UTF-8: its escaped form may equal another file's name."""
    return any(len(name.encode()) != len(path) for name, path in zip(shard.ids, shard.paths, strict=True))


def _row(shard: Shard, schema: pa.Schema) -> pa.Table:
    cells = [pa.array([getattr(shard, field.name)], field.type) for field in schema if field.name != KEPT]
    if KEPT in schema.names:
        kind = schema.field(KEPT).type
        kept: pa.Array = pa.nulls(1, kind)
        if shard.kept is not None:
            columns = [column.combine_chunks() for column in shard.kept.columns]
            structs = pa.StructArray.from_arrays(columns, fields=list(kind.value_type))
            kept = pa.ListArray.from_arrays(pa.array([0, shard.rows], pa.int32()), structs, type=kind)
        cells.append(kept)
    return pa.Table.from_arrays(cells, schema=schema)


def require_countable(source: Source, limit: int | None) -> None:
    """Refuses a limit on an input whose images cannot be counted beforehand.

    Raises:
        InputError: A limit is set, and the input is made of tars.
    """
    require(
        limit is None or source.kind != "tar",
        "--limit needs an input whose images can be counted beforehand, which those of a tar cannot",
        InputError,
    )


def limited(shards: Iterator[Shard], limit: int) -> Iterator[Shard]:
    """Yields shards up to a total number of images; the last one is cut short."""
    for shard in shards:
        if shard.rows > limit:
            kept = None if shard.kept is None else shard.kept.slice(0, limit)
            shard = replace(shard, ids=shard.ids[:limit], rows=limit, kept=kept)
            if len(shard.paths) > 1:
                shard = replace(shard, paths=shard.paths[:limit])
        limit -= shard.rows
        yield shard
        if limit <= 0:
            return


def read_plan(folder: StoragePath, root: StoragePath, record: dict[str, Any], settings: dict[str, Any]) -> StoredPlan:
    """Restores a plan from what `StoredPlan.to_json` wrote.

    Args:
        folder: The dataset's folder.
        root: Any path on the input's filesystem.
        record: The plan's entry in `_job.json`.
        settings: The job's `image_column`, `id_column`, `keep` and `rows_per_file`.

    Raises:
        StorageError: The plan cannot be read.
    """
    with _part(folder, 0) as part:
        schema = part.schema
    kept = tuple(schema.field(KEPT).type.value_type) if KEPT in schema.names else ()
    source = Source(
        root=replace(root, path=record["root"]),
        kind=record["kind"],
        links=record["links"],
        image_column=settings["image_column"],
        id_column=settings["id_column"],
        keep=tuple(settings["keep"]),
        kept=kept,
    )
    numbers = {name: record[name] for name in ("shards", "images", "per_file")}
    return StoredPlan(folder=folder, source=source, rows_per_file=settings["rows_per_file"], **numbers)


def plan_of_record(folder: StoragePath, record: dict[str, Any]) -> StoredPlan:
    """Restores the plan from all of `_job.json`, to compare it with the dataset's files; the input need not exist."""
    return read_plan(folder, folder, record["plan"], record)


def _require_unique_ids(plan: StoredPlan) -> None:
    """Refuses an input with duplicate or empty ids.

    Raises:
        InputError: There are some.
    """
    source = plan.source
    result = check_ids(_id_files(plan), plan.images or 0)
    column = f"column {(source.id_column or source.image_column)!r}" if source.kind != "files" else "the file names"
    if result.missing:
        raise InputError(f"{column} has {result.missing} empty ids; every image needs one")
    if result.repeated:
        nameless = source.kind == "links" and not source.id_column
        advice = "; name a column of unique ids with --id-column" if nameless else ""
        raise InputError(
            f"ids must be unique, but {result.repeated} of {column} are given more than once, "
            f"such as {result.example!r}{advice}"
        )


def _id_files(plan: StoredPlan) -> list[IdFile]:
    """Returns the files that hold the ids."""
    files = range(-(-plan.shards // plan.per_file))
    if plan.source.kind != "table":
        return [IdFile(plan.folder / PLAN, _file_name(file).encode(), "ids") for file in files]
    assert plan.source.id_column is not None
    names: dict[bytes, None] = {}
    for file in files:
        with _part(plan.folder, file) as part:
            paths = part.read_groups(range(len(part.groups)), ["paths"]).column(0)
        names |= dict.fromkeys(pc.list_flatten(paths).unique().to_pylist())
    return [IdFile(plan.source.root, name, plan.source.id_column) for name in names]
