"""Parquet and Arrow tables, of which a shard is a slice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute

from jobs.sources.columnar import ARROW_EXTENSIONS, PARQUET_EXTENSIONS, READ_ERRORS, open_table
from jobs.sources.fetch import fetch, raise_if_unavailable
from jobs.sources.kept import kept_fields
from jobs.sources.records import (
    Format,
    ImageBytes,
    Input,
    InputError,
    Row,
    Rows,
    Shard,
    Source,
    make_rows,
    readable,
    require_distinct,
)
from jobs.storage.path import StoragePath
from jobs.storage.retry import reason, retry_while_unavailable

pc: Any = pyarrow.compute  # its functions are created at import, so that type checkers do not know them


READERS = 16
"""Tables that are read concurrently while an input is planned."""


class _TableInfo(NamedTuple):
    schema: pa.Schema
    rows: int


def _inspect(root: StoragePath, name: bytes) -> _TableInfo:
    """Returns a table's schema and number of rows.

    Raises:
        InputError: the table cannot be read.
    """
    try:
        with open_table(root, name) as table:
            return _TableInfo(table.schema, sum(table.groups))
    except READ_ERRORS as error:
        raise InputError(f"{readable(name)!r} cannot be read as a table: {reason(error)}") from error


def open_tables(uri: str, source: Source, names: Iterable[bytes], rows_per_file: int) -> Input:
    """Cuts tables into slices; see `Format.open`.

    Raises:
        InputError: a table cannot be read, a column is missing or has an unsuitable type, or tables differ in the
            types of the requested columns; of later tables when their shards are consumed.
    """
    names = require_distinct(names)
    first = _inspect(source.root, names[0])
    fields, links = _columns(source, readable(names[0]), first.schema)
    source = replace(source, kind="table", links=links, kept=kept_fields(fields))

    def shards() -> Iterator[Shard]:
        number = 0
        with ThreadPoolExecutor(READERS) as pool:
            others = pool.map(lambda name: _inspect(source.root, name), names[1:])
            for name, info in zip(names, chain([first], others), strict=True):
                label = readable(name)
                own_fields, own_links = _columns(source, label, info.schema)
                if [field.type for field in own_fields] != [field.type for field in fields]:
                    raise InputError(f"{label!r} has other types in the kept columns than {readable(names[0])!r}")
                if own_links != links:
                    raise InputError(f"{label!r} holds links where {readable(names[0])!r} holds bytes, or the reverse")
                for start in range(0, info.rows, rows_per_file):
                    rows = min(rows_per_file, info.rows - start)
                    yield Shard(number=number, paths=(name,), start=start, rows=rows)
                    number += 1
        if not number:
            raise InputError(f"no images in {source.root.path!r}: its tables have no rows")

    return Input(source=source, shards=shards(), files=len(names), columns=tuple(first.schema.names))


def _columns(source: Source, label: str, schema: pa.Schema) -> tuple[list[pa.Field], bool]:
    """Returns the fields of the kept columns, and whether the image column holds links.

    Raises:
        InputError: a column is missing, ambiguous, or has an unsuitable type.
    """
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


def read_table(source: Source, shard: Shard, batch_size: int, max_bytes: int, pool: Executor) -> Iterator[Rows]:
    """Yields a slice of a table in batches; see `Format.read`.

    Raises:
        StorageError: an object store was unavailable.
    """
    label = readable(shard.paths[0])
    numbered = [f"{label}#{row}" for row in range(shard.start, shard.start + shard.rows)]
    try:
        table = _read_slice(source, shard)
    except READ_ERRORS as error:
        nulls = [pa.nulls(shard.rows, field.type) for field in source.kept]
        yield from make_rows(numbered, [_unreadable(error)] * shard.rows, nulls).slices(batch_size)
        return
    ids = table.column(source.id_column).cast(pa.string()).to_pylist() if source.id_column else numbered
    kept = []
    for name, field in zip(source.keep, source.kept, strict=True):
        column = table.column(name)
        kept.append((column if column.type == field.type else column.cast(field.type)).combine_chunks())
    for start in range(0, shard.rows, batch_size):
        cells = _cells(source, table.column(source.image_column).slice(start, batch_size))
        images = _resolve_links(source, cells, max_bytes, pool)
        yield make_rows(ids[start : start + batch_size], images, [column.slice(start, batch_size) for column in kept])


def _unreadable(error: BaseException) -> ImageBytes:
    return ImageBytes(None, f"the table cannot be read: {reason(error)}")


@retry_while_unavailable
def _read_slice(source: Source, shard: Shard) -> pa.Table:
    columns = [source.image_column, *source.keep, *([source.id_column] if source.id_column else [])]
    try:
        with open_table(source.root, shard.paths[0]) as table:
            return table.read(list(dict.fromkeys(columns)), shard.start, shard.rows)
    except OSError as error:
        raise_if_unavailable(source.root, shard.paths[0], error)
        raise


_Cell = ImageBytes | bytes
"""A cell of the image column: bytes, or the reason why there are none; or a link that has not been resolved yet."""


def _cells(source: Source, column: pa.ChunkedArray) -> list[_Cell]:
    """Converts a slice of the image column."""
    null = ImageBytes(None, f"the column {source.image_column!r} is null here")
    cells: list[_Cell] = []
    for chunk in column.chunks:  # not combined, as together they may exceed Arrow's limit of 2 GiB
        if source.links:
            cells += [null if link is None else link.encode() for link in chunk.to_pylist()]
            continue
        is_struct = pa.types.is_struct(chunk.type)
        contents = pc.struct_field(chunk, "bytes") if is_struct else chunk  # null where the struct or its field is
        has_links = is_struct and any(field.name == "path" for field in chunk.type) and contents.null_count
        links = pc.struct_field(chunk, "path").to_pylist() if has_links else [None] * len(chunk)
        for data, link in zip(contents.to_pylist(), links, strict=True):
            cells.append(ImageBytes(data, None) if data is not None else null if link is None else str(link).encode())
    return cells


def _resolve_links(source: Source, cells: Sequence[_Cell], max_bytes: int, pool: Executor) -> list[ImageBytes]:
    """Fetches the images of the cells that are links."""
    links = [cell for cell in cells if isinstance(cell, bytes)]
    fetched = iter(fetch(source.root, links, max_bytes, pool) if links else ())
    return [next(fetched) if isinstance(cell, bytes) else cell for cell in cells]


def read_table_rows(source: Source, rows: Sequence[Row], max_bytes: int, pool: Executor) -> Rows:
    """Reads single rows of tables, each of the row groups that hold any of them once; see `Format.read_rows`.

    Raises:
        StorageError: an object store was unavailable.
    """
    assert not source.id_column, "ids of a column are only read with whole shards"
    numbers: dict[bytes, list[int]] = {}
    for row in rows:
        numbers.setdefault(row.path, []).append(row.number)
    tables = dict(zip(numbers, pool.map(lambda path: _read_cells(source, path, numbers[path]), numbers), strict=True))
    cells = [tables[row.path][row.number] for row in rows]
    ids = [f"{readable(row.path)}#{row.number}" for row in rows]
    return make_rows(ids, _resolve_links(source, cells, max_bytes, pool))


@retry_while_unavailable
def _read_cells(source: Source, path: bytes, numbers: list[int]) -> dict[int, _Cell]:
    """Reads the image column of some rows of a table, by number."""
    missing = ImageBytes(None, "the table has no such row any more")
    cells: dict[int, _Cell] = dict.fromkeys(numbers, missing)
    end = 0
    try:
        with open_table(source.root, path) as table:
            for group, rows in enumerate(table.groups):
                start, end = end, end + rows
                if members := [number for number in cells if start <= number < end]:
                    column = table.read_groups([group], [source.image_column]).column(source.image_column)
                    for number in members:
                        (cells[number],) = _cells(source, column.slice(number - start, 1))
    except READ_ERRORS as error:
        if isinstance(error, OSError):
            raise_if_unavailable(source.root, path, error)
        bad = _unreadable(error)
        cells = {n: cell if isinstance(cell, bytes) or cell.data is not None else bad for n, cell in cells.items()}
    return cells


TABLES = Format(
    kind="table",
    description="Parquet, Arrow",
    extensions=(*PARQUET_EXTENSIONS, *ARROW_EXTENSIONS),
    open=open_tables,
    read=read_table,
    read_rows=read_table_rows,
)
