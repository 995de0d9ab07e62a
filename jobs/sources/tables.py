"""Parquet and Arrow tables, cut into shards and read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute

from jobs.sources import columnar
from jobs.sources.columnar import BROKEN, open_table
from jobs.sources.fetch import fetch, raise_if_unavailable
from jobs.sources.kept import kept_fields
from jobs.sources.records import Bytes, Input, InputError, Rows, Shard, Source, make_rows, readable, require_distinct
from jobs.storage.path import StoragePath
from jobs.storage.retry import again, reason

READERS = 16
"""Files whose beginnings or ends are read side by side while planning."""


class _Looked(NamedTuple):
    schema: pa.Schema
    rows: int


def _look(root: StoragePath, name: bytes) -> _Looked:
    """A table's columns and length.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open_table(root, name) as table:
            return _Looked(table.schema, sum(table.groups))
    except columnar.BROKEN as error:
        raise InputError(f"{readable(name)!r} cannot be read as a table: {reason(error)}") from error


def open_tables(source: Source, names: list[bytes], rows_per_file: int) -> Input:
    require_distinct(names)
    first = _look(source.root, names[0])
    fields, links = _columns(source, readable(names[0]), first.schema)
    source = replace(source, kind="table", links=links, kept=kept_fields(fields))

    def shards() -> Iterator[Shard]:
        number = 0
        with ThreadPoolExecutor(READERS) as pool:
            looks = pool.map(lambda name: _look(source.root, name), names[1:])
            for name, look in zip(names, chain([first], looks), strict=True):
                label = readable(name)
                here, here_links = _columns(source, label, look.schema)
                if [f.type for f in here] != [f.type for f in fields]:
                    raise InputError(f"{label!r} has other types in the kept columns than {readable(names[0])!r}")
                if here_links != links:
                    raise InputError(f"{label!r} holds links where {readable(names[0])!r} holds bytes, or the reverse")
                for start in range(0, look.rows, rows_per_file):
                    rows = min(rows_per_file, look.rows - start)
                    yield Shard(number=number, paths=(name,), start=start, rows=rows)
                    number += 1
        if not number:
            raise InputError(f"no images in {source.root.path!r}: its tables have no rows")

    return Input(source=source, shards=shards(), files=len(names), columns=tuple(first.schema.names))


def _columns(source: Source, label: str, schema: pa.Schema) -> tuple[list[pa.Field], bool]:
    """The fields to keep, and whether the images are links."""
    for column in (source.image_column, *source.keep, *([source.id_column] if source.id_column else [])):
        if column not in schema.names:
            raise InputError(f"{label!r} has no column {column!r}; it has {', '.join(schema.names)}")
        if schema.names.count(column) > 1:
            raise InputError(f"{label!r} has several columns {column!r}; rename all but one")
    kind = schema.field(source.image_column).type
    if not (links := _is_text(kind)) and not _holds_bytes(kind):
        raise InputError(
            f"column {source.image_column!r} of {label!r} must hold image bytes (binary, or a struct with a binary "
            f"field 'bytes') or paths and URIs (string), got {kind}"
        )
    if source.id_column:
        try:
            pa.nulls(0, schema.field(source.id_column).type).cast(pa.string())
        except pa.ArrowException as error:
            kind = schema.field(source.id_column).type
            raise InputError(f"column {source.id_column!r} must hold text or numbers, got {kind}") from error
    return [schema.field(column) for column in source.keep], links


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


pc: Any = pyarrow.compute  # whose functions are made on import, unseen by type checkers


def read_table(source: Source, shard: Shard, size: int, max_bytes: int, pool: Executor) -> Iterator[Rows]:
    label = readable(shard.paths[0])
    numbered = [f"{label}#{row}" for row in range(shard.start, shard.start + shard.rows)]
    try:
        table = _slice(source, shard)
    except BROKEN as error:
        bad = Bytes(None, f"the table cannot be read: {reason(error)}")
        nothing = [pa.nulls(shard.rows, field.type) for field in source.kept]
        yield from make_rows(numbered, [bad] * shard.rows, nothing).slices(size)
        return
    ids = table.column(source.id_column).cast(pa.string()).to_pylist() if source.id_column else numbered
    kept = [
        table.column(name).cast(field.type).combine_chunks()
        if table.column(name).type != field.type
        else table.column(name).combine_chunks()
        for name, field in zip(source.keep, source.kept, strict=True)
    ]
    for start in range(0, shard.rows, size):
        cells = _cells(source, table.column(source.image_column).slice(start, size))
        answers = resolve_links(source, cells, max_bytes, pool)
        yield make_rows(ids[start : start + size], answers, [column.slice(start, size) for column in kept])


@again
def _slice(source: Source, shard: Shard) -> pa.Table:
    columns = [source.image_column, *source.keep, *([source.id_column] if source.id_column else [])]
    try:
        with open_table(source.root, shard.paths[0]) as table:
            return table.read(list(dict.fromkeys(columns)), shard.start, shard.rows)
    except OSError as error:
        raise_if_unavailable(source, shard.paths[0], error)
        raise


def _cells(source: Source, column: pa.ChunkedArray) -> list[Bytes | bytes]:
    """A column's images: bytes, or links still to be followed, or why there is nothing."""
    null = Bytes(None, f"the column {source.image_column!r} is null here")
    cells: list[Bytes | bytes] = []
    for chunk in column.chunks:  # never combined: together they may exceed Arrow's 2 GiB
        if source.links:
            cells += [null if link is None else link.encode() for link in chunk.to_pylist()]
            continue
        plain = pc.struct_field(chunk, "bytes") if pa.types.is_struct(chunk.type) else chunk  # with its own nulls
        names = [field.name for field in chunk.type] if pa.types.is_struct(chunk.type) else []
        followed = "path" in names and plain.null_count
        links = pc.struct_field(chunk, "path").to_pylist() if followed else [None] * len(chunk)
        for data, link in zip(plain.to_pylist(), links, strict=True):
            cells.append(Bytes(data, None) if data is not None else null if link is None else str(link).encode())
    return cells


def resolve_links(source: Source, cells: list[Bytes | bytes], max_bytes: int, pool: Executor) -> list[Bytes]:
    links = [cell for cell in cells if isinstance(cell, bytes)]
    followed = iter(fetch(source.root, links, max_bytes, pool) if links else ())
    return [next(followed) if isinstance(cell, bytes) else cell for cell in cells]


@again
def pick_cells(source: Source, path: bytes, numbers: list[int]) -> dict[int, Bytes | bytes]:
    """Some rows of a table: by number the image, a link to it, or why there is none."""
    cells: dict[int, Bytes | bytes] = dict.fromkeys(numbers, Bytes(None, "the table has no such row any more"))
    last = -1  # row before the group
    try:
        with open_table(source.root, path) as table:
            for group, rows in enumerate(table.groups):
                first, last = last + 1, last + rows
                if here := [number for number in cells if first <= number <= last]:
                    column = table.read_groups([group], [source.image_column]).column(source.image_column)
                    for number in here:
                        (cells[number],) = _cells(source, column.slice(number - first, 1))
    except BROKEN as error:
        if isinstance(error, OSError):
            raise_if_unavailable(source, path, error)
        bad = Bytes(None, f"the table cannot be read: {reason(error)}")
        cells = {n: cell if isinstance(cell, bytes) or cell.data is not None else bad for n, cell in cells.items()}
    return cells
