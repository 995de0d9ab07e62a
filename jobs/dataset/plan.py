"""The plan of a dataset, kept with it: what is to be tokenized, shard by shard, written once and read by every worker.

`_plan/*.parquet` has one row per shard, in order; every file but the last has the same number of them. Neither the
driver nor a worker ever holds more of it than one file.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.dataset.unique_ids import IdFile, pc, repeated_ids
from jobs.sources.columnar import READ_ERRORS, ColumnarFile, open_table
from jobs.sources.records import Input, InputError, Shard, Source, readable
from jobs.storage.path import StoragePath
from jobs.storage.retry import StorageError, reason

PLAN = "_plan"


KEPT = "kept"
"""The plan's column for what a list keeps, a struct per image; tables keep theirs, but their types stand here too."""


NAMES_PER_FILE = 1 << 16
"""Images whose names one file of the plan holds, about."""


SHARDS_PER_FILE = 1 << 10


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPlan:
    """A plan that lies with its dataset; small and picklable.

    Attributes:
        folder: the dataset's.
        source: how shards are read.
        shards: their number.
        images: in all of them; None where tars do not tell.
        per_file: shards in each of the plan's files.
        rows_per_file: images in a shard, at most.
    """

    folder: StoragePath
    source: Source
    shards: int
    images: int | None
    per_file: int
    rows_per_file: int

    def shard(self, number: int) -> Shard:
        """One shard.

        Raises:
            StorageError: the plan cannot be read.
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
        """The ids that a shard's files must hold; None where the input alone knows them."""
        shard = self.shard(number)
        if self.source.kind == "tar" or (self.source.id_column and self.source.kind == "table"):
            return None
        if self.source.kind == "table":
            label = readable(shard.paths[0])
            return [f"{label}#{row}" for row in range(shard.start, shard.start + shard.rows)]
        return list(shard.ids)

    def to_json(self) -> dict[str, Any]:
        """All but the folder and the kept columns' types, which stand in the files."""
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
    """One of the plan's files; no cache of it, as functions with one cannot travel to Ray's workers by value."""
    try:
        with open_table(folder / PLAN, _file_name(number).encode()) as part:
            yield part
    except READ_ERRORS as error:
        where = folder / PLAN / _file_name(number)
        raise StorageError(f"the dataset's plan cannot be read: {where.path!r}: {reason(error)}") from error


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
    folder: StoragePath, found: Input, rows_per_file: int, limit: int | None, tell: Any = None
) -> StoredPlan:
    """Lists an input into a dataset's plan.

    Args:
        folder: the dataset's.
        limit: images to plan at most.
        tell: called with the number of images found so far, now and then.

    Raises:
        InputError: the input cannot be listed, names an image twice, or `limit` stands beside tars.
        StorageError: the plan cannot be written.
    """
    source = found.source
    listed = source.kind in ("files", "links")
    per_file = max(1, NAMES_PER_FILE // rows_per_file) if listed else SHARDS_PER_FILE
    require_countable(source, limit)
    shards = found.shards if limit is None else limited(found.shards, limit)
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
        if tell is not None:
            tell(images)
        if len(rows) < per_file:
            break
    total = None if source.kind == "tar" else images
    plan = StoredPlan(
        folder=folder, source=source, shards=count, images=total, per_file=per_file, rows_per_file=rows_per_file
    )
    if escaped or source.kind == "links" or (source.kind == "table" and source.id_column):
        _require_unique_ids(plan)
        pa.default_memory_pool().release_unused()  # the ids
    return plan


def _escaped(shard: Shard) -> bool:
    """Whether a name is no UTF-8: its escaped form may be another one's name."""
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
    """Refuses a limit on what cannot be counted beforehand.

    Raises:
        InputError: it is tars that are to be limited.
    """
    if limit is not None and source.kind == "tar":
        raise InputError("--limit needs an input whose images can be counted beforehand, which those of a tar cannot")


def limited(shards: Iterator[Shard], limit: int) -> Iterator[Shard]:
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
    """A plan as `StoredPlan.to_json` describes it.

    Args:
        root: the input's filesystem, with any path.
        settings: `image_column`, `id_column`, `keep` and `rows_per_file`, which the job's record has.
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
    """The plan of a dataset whose `_job.json` is `record`, to compare with its files; the input need not be there."""
    return read_plan(folder, folder, record["plan"], record)


def _require_unique_ids(plan: StoredPlan) -> None:
    """Refuses an input whose ids name an image twice.

    Raises:
        InputError: some are given more than once, or are missing.
    """
    source = plan.source
    nulls, number, example = repeated_ids(_id_files(plan), plan.images or 0)
    column = f"column {(source.id_column or source.image_column)!r}" if source.kind != "files" else "the file names"
    if nulls:
        raise InputError(f"{column} has {nulls} empty ids; every image needs one")
    if number:
        nameless = source.kind == "links" and not source.id_column
        advice = "; name a column of unique ids with --id-column" if nameless else ""
        raise InputError(
            f"ids must be unique, but {number} of {column} are given more than once, such as {example!r}{advice}"
        )


def _id_files(plan: StoredPlan) -> list[IdFile]:
    """The files that hold the ids: a root, a name below it, and the column."""
    files = range(-(-plan.shards // plan.per_file))
    if plan.source.kind != "table":
        return [(plan.folder / PLAN, _file_name(file).encode(), "ids") for file in files]
    assert plan.source.id_column is not None
    names: dict[bytes, None] = {}
    for file in files:
        with _part(plan.folder, file) as part:
            paths = part.read_groups(range(len(part.groups)), ["paths"]).column(0)
        names |= dict.fromkeys(pc.list_flatten(paths).unique().to_pylist())
    return [(plan.source.root, name, plan.source.id_column) for name in names]
