"""What to tokenize: folders, globs, tables, lists and tars of images become shards, one after the other.

A shard is a fixed slice of the listed input, and the unit of all work: one token file, one reject file. The slices
depend on the listing and on `rows_per_file` alone. `jobs.reading` turns a shard into bytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from alit.images import EXTENSIONS
from alit.tokens import kept_name
from jobs import columnar, lists
from jobs.columnar import open_table
from jobs.listing import InputError, list_files
from jobs.storage import Place, reason

TARS = (".tar", ".tar.gz", ".tgz")
READERS = 16
"""Files whose beginnings or ends are read side by side while planning."""

Kind = Literal["files", "links", "table", "tar"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A slice of the input.

    Attributes:
        number: names its files.
        ids: of its images, in order; empty for tables and tars, whose ids are read with the images.
        paths: of its image files, as bytes (names need not be UTF-8), one per id; or the one table or tar.
        start, rows: the slice of the table; `rows` is the number of images in either case, 0 for a tar: unknown.
        kept: the kept columns of a list, under their names in the output.
    """

    number: int
    ids: tuple[str, ...] = ()
    paths: tuple[bytes, ...]
    start: int = 0
    rows: int
    kept: pa.Table | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the input lies and how its shards are read; small and picklable, every worker has it.

    Attributes:
        root: the folder below which all paths lie, but for the links of a list that are absolute.
        kind: files below the root; links that a list gives; slices of tables (Parquet, Arrow); whole tars.
        image_column: of tables and lists; of tars the extension of the image's file, any image when "image".
        id_column: of tables and lists; made from the file's name and the row when None.
        links: whether the table's image column holds paths or URIs, in place of bytes.
        keep: the columns to carry through, under their names in the input.
        kept: the same under their names in the output.
    """

    root: Place
    kind: Kind = "files"
    image_column: str = "image"
    id_column: str | None = None
    links: bool = False
    keep: tuple[str, ...] = ()
    kept: tuple[pa.Field, ...] = ()

    @property
    def sliced(self) -> bool:
        """Whether shards are slices of files: neighbouring images are read together."""
        return self.kind == "table"


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """What an INPUT names: how to read it, and its shards, which are listed while they are taken.

    Attributes:
        files: how many image files, tables, lists or tars hold it; of image files None, as they are not listed yet.
        columns: of its first table or list.
    """

    source: Source
    shards: Iterator[Shard]
    files: int | None = None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A whole input in memory: every image is in exactly one shard."""

    source: Source
    shards: tuple[Shard, ...]

    @property
    def images(self) -> int:
        return sum(shard.rows for shard in self.shards)


class Row(NamedTuple):
    """One image of the input: its file, and the row of it where that is a table."""

    path: bytes
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The bytes of some images; where reading failed, the data is None and the error says why."""

    ids: list[str]
    data: list[bytes | None]
    errors: list[str | None]
    kept: list[pa.Array] = field(default_factory=list)

    def slices(self, size: int) -> Iterator[Rows]:
        for start in range(0, len(self.ids), size):
            stop = start + size
            kept = [column.slice(start, size) for column in self.kept]
            yield Rows(ids=self.ids[start:stop], data=self.data[start:stop], errors=self.errors[start:stop], kept=kept)


def make_plan(uri: str, *, rows_per_file: int, image_column: str = "image", id_column: str | None = None) -> Plan:
    """A whole input in memory, to read its images in any order or only the first ones.

    Raises:
        InputError: as `open_input`; or the input is tars, which can only be read from front to back.
    """
    found = open_input(uri, rows_per_file=rows_per_file, image_column=image_column, id_column=id_column)
    if found.source.kind == "tar":
        raise InputError(f"{uri!r} holds tars, which only `alit tokenize` reads; unpack them, or name Parquet files")
    return Plan(source=found.source, shards=tuple(found.shards))


def open_input(
    uri: str,
    *,
    rows_per_file: int,
    keep: Sequence[str] = (),
    image_column: str = "image",
    id_column: str | None = None,
) -> Input:
    """Finds out what an input is, and cuts it into shards while it is listed.

    Args:
        uri: a folder (its image files, or else its tables, or else its tars, at any depth), a glob, or one file, which
            may also be a list (.txt, .csv, .tsv, .jsonl) of paths and URIs; local, or at a URI such as
            `s3://bucket/folder`.
        rows_per_file: images per shard, at most; a tar is a shard, whatever it holds.
        keep: columns to carry through; of tars the extensions of text files that lie beside the images.
        image_column: the column that holds the images: bytes, plain or as `struct<bytes, path>`, or paths and URIs.
        id_column: the column with unique ids.

    Raises:
        InputError: nothing to tokenize, a missing column, or files that cannot be read; some of it only when the
            shards are taken.
    """
    if rows_per_file < 1:
        raise InputError(f"--rows-per-file must be at least 1, got {rows_per_file}")
    root, names, folder = list_files(uri)
    before: list[bytes] = []
    first = None
    for name in names:
        if _extension(name) in _IMAGES:
            first = name
            break
        before.append(name)
    if first is not None:
        if keep or id_column:
            option = "--keep" if keep else "--id-column"
            raise InputError(f"{option} needs a table or a list; {uri!r} holds image files, which have no columns")
        pictures = (name for name in chain([first], names) if _extension(name) in _IMAGES)
        return Input(source=Source(root=root), shards=_file_shards(pictures, rows_per_file))
    source = Source(root=root, image_column=image_column, id_column=id_column, keep=tuple(keep))
    if tables := [name for name in before if _extension(name) in _TABLES]:
        return _open_tables(source, tables, rows_per_file)
    if tars := [name for name in before if name.lower().endswith(tuple(e.encode() for e in TARS))]:
        return _open_tars(source, tars)
    if not folder and (found := [name for name in before if _extension(name) in _LISTS]):
        return _open_lists(source, found, rows_per_file)
    raise InputError(
        f"no images in {uri!r}: looked for {', '.join(sorted(EXTENSIONS))} files, Parquet, Arrow and tars at any "
        f"depth; a list ({', '.join(sorted(lists.EXTENSIONS))}) is named itself"
    )


def _extension(name: bytes) -> bytes:
    return os.path.splitext(name)[1].lower()


_IMAGES = {extension.encode() for extension in EXTENSIONS}
_TABLES = {extension.encode() for extension in columnar.EXTENSIONS}
_LISTS = {extension.encode() for extension in lists.EXTENSIONS}


def readable(name: bytes) -> str:
    """A name as text; bytes that are no UTF-8, and the escape character itself beside them, as `%XX`."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.replace(b"%", b"%25").decode("utf-8", "surrogateescape").translate(_ESCAPES)


_ESCAPES = {0xDC00 + byte: f"%{byte:02X}" for byte in range(0x80, 0x100)}


# -------------------------------------------------------------------- image files


def _file_shards(names: Iterable[bytes], rows_per_file: int) -> Iterator[Shard]:
    part: list[bytes] = []
    number = 0
    for name in names:
        part.append(name)
        if len(part) == rows_per_file:
            yield _file_shard(number, part)
            part, number = [], number + 1
    if part:
        yield _file_shard(number, part)


def _file_shard(number: int, names: list[bytes]) -> Shard:
    return Shard(number=number, ids=tuple(map(readable, names)), paths=tuple(names), rows=len(names))


# -------------------------------------------------------------------- tables


class _Looked(NamedTuple):
    schema: pa.Schema
    rows: int


def _look(root: Place, name: bytes) -> _Looked:
    """A table's columns and length.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open_table(root, name) as table:
            return _Looked(table.schema, sum(table.groups))
    except columnar.BROKEN as error:
        raise InputError(f"{readable(name)!r} cannot be read as a table: {reason(error)}") from error


def _require_distinct(names: Iterable[bytes]) -> None:
    labels: dict[str, bytes] = {}
    for name in names:
        if labels.setdefault(readable(name), name) != name:
            raise InputError(f"two files are both called {readable(name)!r} where names must be UTF-8; rename one")


def _open_tables(source: Source, names: list[bytes], rows_per_file: int) -> Input:
    _require_distinct(names)
    first = _look(source.root, names[0])
    fields, links = _columns(source, readable(names[0]), first.schema)
    source = replace(source, kind="table", links=links, kept=_kept(fields))

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


def plain(kind: pa.DataType) -> pa.DataType:
    """The type that a kept column gets: views, which little software reads, become what they are views of."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _kept(fields: Iterable[pa.Field]) -> tuple[pa.Field, ...]:
    # nullable, as another file's column of the same type may be
    kept = tuple(
        field.with_name(kept_name(field.name)).with_type(plain(field.type)).with_nullable(True).remove_metadata()
        for field in fields
    )
    for column in kept:
        try:
            nothing = pa.nulls(0, column.type).filter(pa.array([], pa.bool_()))
            pq.write_table(pa.table([nothing], pa.schema([column])), io.BytesIO())
        except (pa.ArrowException, TypeError) as error:
            raise InputError(f"column {column.name!r} holds {column.type}, which cannot be kept: {error}") from error
    if len({column.name for column in kept}) < len(kept):
        raise InputError(f"--keep names a column twice: in the output they would be {', '.join(f.name for f in kept)}")
    return kept


# -------------------------------------------------------------------- tars and lists


def _open_tars(source: Source, names: list[bytes]) -> Input:
    if source.id_column:
        raise InputError("--id-column needs a table or a list; the images of a tar are named after it and themselves")
    _require_distinct(names)
    kept = _kept(pa.field(name, pa.string()) for name in source.keep)
    shards = (Shard(number=i, paths=(name,), rows=0) for i, name in enumerate(names))
    return Input(source=replace(source, kind="tar", kept=kept), shards=shards, files=len(names))


def _open_lists(source: Source, names: list[bytes], rows_per_file: int) -> Input:
    table = lists.read(source.root, names, source.image_column, source.id_column, source.keep)
    kept = _kept(table.kept)

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
