"""Lists of images: .txt with a path or URI per line, .csv and .tsv with a header, .jsonl with an object per line.

They are read in blocks, so that a list may be larger than memory. The images that they name are read as files are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.json as json

from jobs.sources.files import read_file_rows, read_files
from jobs.sources.kept import kept_fields
from jobs.sources.records import Format, Input, InputError, Shard, Source, readable
from jobs.storage.path import StoragePath
from jobs.storage.retry import as_os_error, reason

_EXTENSIONS = (b".csv", b".jsonl", b".ndjson", b".tsv", b".txt")


_JSON_EXTENSIONS = (b".jsonl", b".ndjson")


_LINK, _ID = "link", "id"
"""The first two columns of a block, which name the image; the kept ones follow under their own names."""


BLOCK_BYTES = 4 << 20
"""Bytes that are parsed at once; column types are inferred from the first block."""


def open_lists(uri: str, source: Source, names: Iterable[bytes], rows_per_file: int) -> Input:
    """Cuts lists, one after the other, into shards; see `Format.open`.

    Raises:
        InputError: a column is missing or has an unsuitable type, or a list cannot be read or is empty; of later lists
            when their shards are consumed.
    """
    names = list(names)
    lists = _read_lists(source, names)
    kept = kept_fields(lists.kept)

    def shards() -> Iterator[Shard]:
        number = 0
        for table in _regroup(lists.blocks, rows_per_file):
            paths = tuple((link or "").encode() for link in table.column(0).to_pylist())
            ids = tuple(table.column(1).to_pylist())
            columns = pa.Table.from_arrays(table.columns[2:], schema=pa.schema(kept)) if kept else None
            yield Shard(number=number, ids=ids, paths=paths, rows=len(ids), kept=columns)
            number += 1
        if not number:
            raise InputError(f"no images in {readable(names[0])!r}: the list is empty")

    return Input(
        source=replace(source, kind="links", kept=kept), shards=shards(), files=len(names), columns=lists.columns
    )


class _Lists(NamedTuple):
    """Lists that are read one after the other.

    Attributes:
        kept: The fields of the kept columns.
        columns: The names of all columns of the first list.
        blocks: Tables with the columns `_LINK`, `_ID` and the kept ones.
    """

    kept: list[pa.Field]
    columns: tuple[str, ...]
    blocks: Iterator[pa.Table]


def _read_lists(source: Source, names: Sequence[bytes]) -> _Lists:
    """Starts to read lists.

    Raises:
        InputError: a column is missing, or a list cannot be read; of later lists when their blocks are consumed.
    """
    image_column, id_column = source.image_column, source.id_column
    blocks = chain.from_iterable(_blocks(source, name) for name in names)
    first = next(blocks, None)
    if first is None:
        raise InputError(f"no images in {os.fsdecode(names[0])!r}: the list is empty")
    kept = [first.schema.field(name) for name in source.keep]
    for column in (image_column, id_column):
        if column and pa.types.is_nested(first.schema.field(column).type):
            raise InputError(f"column {column!r} must hold text or numbers, got {first.schema.field(column).type}")

    def selected() -> Iterator[pa.Table]:
        for block in chain([first], blocks):
            links = _text(block.column(image_column))
            ids = _text(block.column(id_column)) if id_column else links
            if ids.null_count:
                column = id_column or image_column
                raise InputError(f"column {column!r} has {ids.null_count} empty ids; every image needs one")
            columns = [links, ids, *(_cast(block.column(field.name), field) for field in kept)]
            yield pa.Table.from_arrays(columns, [_LINK, _ID, *(field.name for field in kept)])

    return _Lists(kept, tuple(first.schema.names), selected())


def _regroup(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yields the same rows in tables of exactly `rows` rows, except the last one."""
    pending: list[pa.Table] = []
    count = 0
    for table in tables:
        pending.append(table)
        count += len(table)
        if count >= rows:
            joined = pa.concat_tables(pending)
            complete = count - count % rows
            for start in range(0, complete, rows):
                yield joined.slice(start, rows)
            pending, count = [joined.slice(complete)], count - complete
    if count:
        yield pa.concat_tables(pending)


def _cast(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """Casts a kept column to its type in the first list.

    Raises:
        InputError: the types are not compatible.
    """
    try:
        return column if column.type == field.type else column.cast(field.type)
    except pa.ArrowException as error:
        raise InputError(
            f"column {field.name!r} holds {field.type} in the first list and {column.type} in another: {reason(error)}"
        ) from error


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column if pa.types.is_string(column.type) else column.cast(pa.string())


def _blocks(source: Source, name: bytes) -> Iterator[pa.Table]:
    """Yields the requested columns of one list, block by block; their types are those of the first block.

    Raises:
        InputError: a column is missing or ambiguous, or the list cannot be read.
    """
    image_column, id_column = source.image_column, source.id_column
    requested = list(dict.fromkeys((image_column, *source.keep, *([id_column] if id_column else []))))
    label = name.decode("utf-8", "replace")
    extension = os.path.splitext(name)[1].lower()
    texts = {column: pa.string() for column in (image_column, id_column) if column}  # the id 007 is not the number 7
    try:
        with as_os_error():
            with _open(source.root, name) as file:
                if extension in _JSON_EXTENSIONS:
                    schema = _open_json(file, None).schema
                else:
                    schema = _open_csv(file, extension, image_column, {}).schema
            for column in requested:
                if column not in schema.names:
                    raise InputError(f"{label!r} has no column {column!r}; it has {', '.join(schema.names)}")
                if schema.names.count(column) > 1:
                    raise InputError(f"{label!r} has several columns {column!r}; rename all but one")
            types = {column: _column_type(schema.field(column).type) for column in requested}
            with _open(source.root, name) as file:
                if extension in _JSON_EXTENSIONS:
                    reader = _open_json(file, pa.schema(types))
                else:
                    reader = _open_csv(file, extension, image_column, types | texts)
                for batch in reader:
                    yield pa.Table.from_batches([batch]).select(requested)
    except (OSError, pa.ArrowException) as error:
        if "Empty CSV" in str(error) or "Empty JSON" in str(error):
            return
        raise InputError(f"{label!r} cannot be read as a list: {reason(error)}") from error


def _open(root: StoragePath, name: bytes) -> pa.NativeFile:
    return root.open_arrow(name, block_size=BLOCK_BYTES)


def _open_json(file: pa.NativeFile, schema: pa.Schema | None) -> json.JSONStreamingReader:  # pyright: ignore[reportAttributeAccessIssue]
    parse = json.ParseOptions()
    if schema is not None:
        parse = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    return json.open_json(file, json.ReadOptions(block_size=BLOCK_BYTES), parse)


def _open_csv(
    file: pa.NativeFile, extension: bytes, image_column: str, types: dict[str, pa.DataType]
) -> csv.CSVStreamingReader:
    read, parse = csv.ReadOptions(block_size=BLOCK_BYTES), csv.ParseOptions(newlines_in_values=True)
    if extension == b".txt":  # a single column without a header, whose values may hold anything but line breaks
        read = csv.ReadOptions(block_size=BLOCK_BYTES, column_names=[image_column])
        parse = csv.ParseOptions(delimiter="\x1f", quote_char=False)
        types = {image_column: pa.string()}
    elif extension == b".tsv":
        parse = csv.ParseOptions(delimiter="\t", newlines_in_values=True)
    convert = csv.ConvertOptions(
        column_types=types,
        include_columns=list(types),
        strings_can_be_null=True,
        null_values=[""],  # NA and null are ordinary values
        quoted_strings_can_be_null=False,
    )
    return csv.open_csv(file, read, parse, convert)


def _column_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type to read a column as, given the inferred one: times and columns of nulls are read as text."""
    if pa.types.is_timestamp(kind) or pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_column_type(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_column_type(kind.value_type))
    return kind


LISTS = Format(
    kind="links",
    description=f"a list ({b', '.join(_EXTENSIONS).decode()})",
    extensions=_EXTENSIONS,
    in_folders=False,
    open=open_lists,
    read=read_files,
    read_rows=read_file_rows,
)
