"""Lists of images: .txt with a path or URI per line, .csv and .tsv with a header, .jsonl with an object per line.

They are read in blocks, so that a list may be longer than memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.json as json

from jobs.listing import InputError
from jobs.storage import Place, as_os_error, reason

EXTENSIONS = frozenset({".txt", ".csv", ".tsv", ".jsonl", ".ndjson"})
LINK, ID = "_link", "_id"
"""The columns of a batch that name the image; those to be kept have their own names."""
BLOCK = 4 << 20
"""Bytes that are read, and looked at for the columns' types, at once."""


@dataclass(frozen=True, slots=True)
class List:
    """Lists read one after the other.

    Attributes:
        kept: the fields to carry through.
        columns: that the first one has.
        batches: tables with the columns `LINK`, `ID` and the kept ones.
    """

    kept: list[pa.Field]
    columns: tuple[str, ...]
    batches: Iterator[pa.Table]


def read(root: Place, names: Sequence[bytes], image_column: str, id_column: str | None, keep: Sequence[str]) -> List:
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

    def prepared() -> Iterator[pa.Table]:
        for block in chain([first], blocks):
            links = _text(block.column(image_column))
            ids = _text(block.column(id_column)) if id_column else links
            if ids.null_count:
                column = id_column or image_column
                raise InputError(f"column {column!r} has {ids.null_count} empty ids; every image needs one")
            columns = [links, ids, *(_as_first(block.column(field.name), field) for field in kept)]
            yield pa.table(columns, [LINK, ID, *(field.name for field in kept)])

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
    root: Place, name: bytes, image_column: str, id_column: str | None, wanted: Sequence[str]
) -> Iterator[pa.Table]:
    label = name.decode("utf-8", "replace")
    extension = os.path.splitext(name)[1].lower()
    texts = {column: pa.string() for column in (image_column, id_column) if column}  # 007 is no 7
    try:
        with as_os_error(), _opened(root, name) as file:
            if extension == b".txt":
                # one column without a name; a line may hold anything but a line's end
                options = csv.ReadOptions(column_names=[image_column], block_size=BLOCK)
                parse = csv.ParseOptions(delimiter="\x1f", quote_char=False)
                reader = csv.open_csv(file, options, parse, csv.ConvertOptions(column_types=texts))
            elif extension in (b".csv", b".tsv"):
                parse = csv.ParseOptions(delimiter="\t" if extension == b".tsv" else ",", newlines_in_values=True)
                convert = csv.ConvertOptions(column_types=texts, strings_can_be_null=True)
                reader = csv.open_csv(file, csv.ReadOptions(block_size=BLOCK), parse, convert)
            else:
                reader = json.open_json(file, json.ReadOptions(block_size=BLOCK))
            missing = [column for column in wanted if column not in reader.schema.names]
            if missing:
                raise InputError(f"{label!r} has no column {missing[0]!r}; it has {', '.join(reader.schema.names)}")
            for batch in reader:
                yield pa.Table.from_batches([batch])
    except (OSError, pa.ArrowException) as error:
        if "Empty CSV" in str(error) or "Empty JSON" in str(error):
            return
        raise InputError(f"{label!r} cannot be read as a list: {reason(error)}") from error


def _opened(root: Place, name: bytes) -> pa.NativeFile:
    if root.local:
        return pa.OSFile(os.path.join(os.fsencode(root.path), name), "rb")
    return pa.PythonFile(root.fs.open(f"{root.path}/{name.decode()}", "rb", block_size=BLOCK), mode="r")
