"""Lists of images: .txt with a path or URI per line, .csv and .tsv with a header, .jsonl with an object per line.

They are read in blocks, so that a list may be longer than memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.json as json

from jobs.sources import lists
from jobs.sources.kept import kept_fields
from jobs.sources.records import Input, InputError, Shard, Source, readable
from jobs.storage.path import StoragePath
from jobs.storage.retry import as_os_error, reason

EXTENSIONS = frozenset({".txt", ".csv", ".tsv", ".jsonl", ".ndjson"})


LINK, ID = "link", "id"
"""The first two columns of a batch, which name the image; those to be kept follow under their own names."""


BLOCK = 4 << 20
"""Bytes that are read, and looked at for the columns' types, at once."""


@dataclass(frozen=True, slots=True)
class List:
    """Lists read one after the other.

    Attributes:
        kept: the fields to carry through.
        columns: that the first one has.
        batches: tables with the columns `LINK` and `ID` and after them the kept ones.
    """

    kept: list[pa.Field]
    columns: tuple[str, ...]
    batches: Iterator[pa.Table]


def read(
    root: StoragePath, names: Sequence[bytes], image_column: str, id_column: str | None, keep: Sequence[str]
) -> List:
    """Begins to read lists that lie below a root.

    Raises:
        InputError: a column is missing, or a list cannot be read; for later ones, when they are come to.
    """
    wanted = (image_column, *keep, *([id_column] if id_column else []))
    opened = (_blocks(root, name, image_column, id_column, wanted) for name in names)
    blocks = chain.from_iterable(opened)
    first = next(blocks, None)
    if first is None:
        raise InputError(f"no images in {os.fsdecode(names[0])!r}: the list is empty")
    kept = [first.schema.field(name) for name in keep]
    for column in (image_column, id_column):
        if column and pa.types.is_nested(first.schema.field(column).type):
            raise InputError(f"column {column!r} must hold text or numbers, got {first.schema.field(column).type}")

    def prepared() -> Iterator[pa.Table]:
        for block in chain([first], blocks):
            links = _text(block.column(image_column))
            ids = _text(block.column(id_column)) if id_column else links
            if ids.null_count:
                column = id_column or image_column
                raise InputError(f"column {column!r} has {ids.null_count} empty ids; every image needs one")
            columns = [links, ids, *(_as_first(block.column(field.name), field) for field in kept)]
            yield pa.Table.from_arrays(columns, [LINK, ID, *(field.name for field in kept)])

    return List(kept, tuple(first.schema.names), prepared())


def in_pieces(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `rows`, but for the last one."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += len(table)
        if count >= rows:
            gathered = pa.concat_tables(waiting)
            whole = count - count % rows
            for start in range(0, whole, rows):
                yield gathered.slice(start, rows)
            waiting, count = [gathered.slice(whole)], count - whole
    if count:
        yield pa.concat_tables(waiting)


def _as_first(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    try:
        return column if column.type == field.type else column.cast(field.type)
    except pa.ArrowException as error:
        raise InputError(
            f"column {field.name!r} holds {field.type} in the first list and {column.type} in another: {reason(error)}"
        ) from error


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column if pa.types.is_string(column.type) else column.cast(pa.string())


def _blocks(
    root: StoragePath, name: bytes, image_column: str, id_column: str | None, wanted: Sequence[str]
) -> Iterator[pa.Table]:
    """One list's wanted columns, block by block; their types are those of the first block."""
    label = name.decode("utf-8", "replace")
    extension = os.path.splitext(name)[1].lower()
    texts = {column: pa.string() for column in (image_column, id_column) if column}  # 007 is no 7
    try:
        with as_os_error():
            with _opened(root, name) as file:
                found = _open_json(file, None) if extension in _JSON else _open_csv(file, extension, image_column, {})
                names, first = found.schema.names, found.schema
            for column in wanted:
                if column not in names:
                    raise InputError(f"{label!r} has no column {column!r}; it has {', '.join(names)}")
                if names.count(column) > 1:
                    raise InputError(f"{label!r} has several columns {column!r}; rename all but one")
            types = {column: _plain(first.field(column).type) for column in wanted}
            with _opened(root, name) as file:
                if extension in _JSON:
                    reader = _open_json(file, pa.schema(types))
                else:
                    reader = _open_csv(file, extension, image_column, types | texts)
                for batch in reader:
                    yield pa.Table.from_batches([batch]).select(list(dict.fromkeys(wanted)))
    except (OSError, pa.ArrowException) as error:
        if "Empty CSV" in str(error) or "Empty JSON" in str(error):
            return
        raise InputError(f"{label!r} cannot be read as a list: {reason(error)}") from error


_JSON = (b".jsonl", b".ndjson")


def _open_json(file: pa.NativeFile, schema: pa.Schema | None) -> json.JSONStreamingReader:  # pyright: ignore[reportAttributeAccessIssue]
    parse = json.ParseOptions()
    if schema is not None:
        parse = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    return json.open_json(file, json.ReadOptions(block_size=BLOCK), parse)


def _open_csv(
    file: pa.NativeFile, extension: bytes, image_column: str, types: dict[str, pa.DataType]
) -> csv.CSVStreamingReader:
    read, parse = csv.ReadOptions(block_size=BLOCK), csv.ParseOptions(newlines_in_values=True)
    if extension == b".txt":  # one column without a name, whose values may hold anything but a line's end
        read = csv.ReadOptions(block_size=BLOCK, column_names=[image_column])
        parse = csv.ParseOptions(delimiter="\x1f", quote_char=False)
        types = {image_column: pa.string()}
    elif extension == b".tsv":
        parse = csv.ParseOptions(delimiter="\t", newlines_in_values=True)
    convert = csv.ConvertOptions(
        column_types=types,
        include_columns=list(types),
        strings_can_be_null=True,
        null_values=[""],  # NA and null are words like others
        quoted_strings_can_be_null=False,
    )
    return csv.open_csv(file, read, parse, convert)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type to read a column as: what looks like a time stays the text that it is, and so does what is not known."""
    if pa.types.is_timestamp(kind) or pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_plain(kind.value_type))
    return kind


def _opened(root: StoragePath, name: bytes) -> pa.NativeFile:
    if root.local:
        return pa.OSFile(os.path.join(os.fsencode(root.path), name), "rb")
    return pa.PythonFile(root.fs.open(f"{root.path}/{name.decode()}", "rb", block_size=BLOCK), mode="r")


def open_lists(source: Source, names: list[bytes], rows_per_file: int) -> Input:
    table = lists.read(source.root, names, source.image_column, source.id_column, source.keep)
    kept = kept_fields(table.kept)

    def shards() -> Iterator[Shard]:
        number = 0
        for part in lists.in_pieces(table.batches, rows_per_file):
            paths = tuple((uri or "").encode() for uri in part.column(0).to_pylist())
            ids = tuple(part.column(1).to_pylist())
            columns = pa.Table.from_arrays(part.columns[2:], schema=pa.schema(kept)) if kept else None
            yield Shard(number=number, ids=ids, paths=paths, rows=len(ids), kept=columns)
            number += 1
        if not number:
            raise InputError(f"no images in {readable(names[0])!r}: the list is empty")

    return Input(
        source=replace(source, kind="links", kept=kept), shards=shards(), files=len(names), columns=table.columns
    )
