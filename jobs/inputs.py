"""What to tokenize: a folder tree, a glob or Parquet becomes a plan of shards, and a shard becomes rows of bytes.

A shard is a fixed slice of the listed input, and the unit of all work: one token file, one reject file. The slices
depend on the listing and on `rows_per_file` alone.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from alit.errors import AlitError
from alit.images import EXTENSIONS
from alit.tokens import kept_name
from jobs.storage import Place, place


class InputError(AlitError):
    """An input that cannot be tokenized as asked; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A slice of the input.

    Attributes:
        number: names its files.
        ids: of its images, in order; empty for Parquet, whose ids are read with the rows.
        paths: of its image files, as bytes (names need not be UTF-8), one per id; or the one Parquet file.
        start, rows: the slice of the Parquet file; `rows` is the number of images in either case.
    """

    number: int
    ids: tuple[str, ...]
    paths: tuple[bytes, ...]
    start: int
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the input lies and how its shards are read; small and picklable, every worker has it.

    Attributes:
        root: the input's folder.
        parquet: whether shards are slices of Parquet files.
        image_column, id_column: of Parquet.
        keep: the columns to carry through, under their names in the input.
        kept: the same under their names in the output.
    """

    root: Place
    parquet: bool = False
    image_column: str = "image"
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    kept: tuple[pa.Field, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that will be tokenized: every image is in exactly one shard."""

    source: Source
    shards: tuple[Shard, ...]

    @property
    def images(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def fingerprint(self) -> str:
        """SHA-256 of the listing: the same input in the same slices gives the same."""
        digest = hashlib.sha256()
        for shard in self.shards:
            parts = [shard.number, shard.start, shard.rows, shard.ids, shard.paths]
            digest.update(repr(parts).encode())
        source = self.source
        digest.update(repr((source.root.path, source.image_column, source.id_column, source.keep)).encode())
        return digest.hexdigest()


class Row(NamedTuple):
    """One image of the input: its file, and the row of it where that is Parquet."""

    path: bytes
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The bytes of some images; where reading failed, the data is None and the error says why."""

    ids: list[str]
    data: list[bytes | None]
    errors: list[str | None]
    kept: list[pa.Array]

    def slices(self, size: int) -> Iterator[Rows]:
        for start in range(0, len(self.ids), size):
            stop = start + size
            kept = [column.slice(start, size) for column in self.kept]
            yield Rows(ids=self.ids[start:stop], data=self.data[start:stop], errors=self.errors[start:stop], kept=kept)


def make_plan(
    uri: str,
    *,
    rows_per_file: int,
    keep: Sequence[str] = (),
    image_column: str = "image",
    id_column: str | None = None,
) -> Plan:
    """Lists the input and cuts it into shards.

    Args:
        uri: a folder (its image files, or else its Parquet files, at any depth), a glob, or one file; local, or a
            folder or Parquet file at a URI such as `s3://bucket/folder`.
        rows_per_file: images per shard, at most.
        keep: Parquet columns to carry through.
        image_column: the Parquet column that holds the images' bytes, plain or as `struct<bytes, path>`.
        id_column: the Parquet column with unique ids; `file#row` when None.

    Raises:
        InputError: nothing to tokenize, a missing column, or ids that are not unique.
    """
    if rows_per_file < 1:
        raise InputError(f"--rows-per-file must be at least 1, got {rows_per_file}")
    root, names = _list(uri)
    extensions = {extension.encode() for extension in EXTENSIONS}
    pictures = [name for name in names if os.path.splitext(name)[1].lower() in extensions]
    tables = [name for name in names if name.lower().endswith(b".parquet")]
    if pictures:
        if keep or id_column:
            option = "--keep" if keep else "--id-column"
            raise InputError(f"{option} needs Parquet input; {uri!r} holds image files, which have no columns")
        return _plan_files(root, pictures, rows_per_file)
    if tables:
        return _plan_parquet(root, tables, rows_per_file, tuple(keep), image_column, id_column)
    raise InputError(
        f"no images in {uri!r}: looked for {', '.join(sorted(EXTENSIONS))} and .parquet files, at any depth"
    )


def _list(uri: str) -> tuple[Place, list[bytes]]:
    """The root and the names below it, as sorted bytes relative to it."""
    if "://" in uri:
        root = place(uri)
        info = root.filesystem.get_file_info(root.path)
        if info.type == pafs.FileType.File:
            parent, _, name = root.path.rpartition("/")
            return Place(root.filesystem, parent), [name.encode()]
        if info.type == pafs.FileType.NotFound:
            raise InputError(f"{uri!r} does not exist")
        found = root.filesystem.get_file_info(pafs.FileSelector(root.path, recursive=True))
        names = [f.path[len(root.path) + 1 :].encode() for f in found if f.is_file]
        return root, sorted(name for name in names if not _hidden(name))
    if not uri:  # which abspath takes for the working folder
        raise InputError("the input has no name; name a folder, a glob or a Parquet file")
    path = os.path.abspath(uri)
    if os.path.isdir(path):
        return Place(pafs.LocalFileSystem(), path), sorted(_walk(os.fsencode(path)))
    if os.path.exists(path):
        folder, name = os.path.split(path)
        return Place(pafs.LocalFileSystem(), folder), [os.fsencode(name)]
    if not glob.has_magic(uri):
        raise InputError(f"{uri!r} does not exist")
    parts = Path(uri).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = os.fsencode(os.path.abspath(Path(*parts[:fixed])))
    matches = glob.glob(os.fsencode(Path(*parts[fixed:])), root_dir=base, recursive=True)
    names = {os.path.normpath(match) for match in matches if not os.path.isdir(os.path.join(base, match))}
    return Place(pafs.LocalFileSystem(), os.fsdecode(base)), sorted(names)


def _walk(root: bytes, below: bytes = b"", inside: frozenset[tuple[int, int]] = frozenset()) -> Iterator[bytes]:
    """The files at any depth, through links to folders too, but not through a link to a folder that it lies in."""
    folder = os.path.join(root, below)
    try:
        info = os.stat(folder)
        if (mark := (info.st_dev, info.st_ino)) in inside:
            return
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not entry.name.startswith(b".")]
    except OSError as error:
        raise InputError(f"{os.fsdecode(folder)!r} cannot be listed: {error.strerror}") from error
    for entry in entries:
        path = os.path.join(below, entry.name)
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _walk(root, path, inside | {mark})
        else:
            yield path


def _hidden(name: bytes) -> bool:
    return any(part.startswith(b".") for part in name.split(b"/"))


def _readable(name: bytes) -> str:
    """A name as text; bytes that are no UTF-8, and the escape character itself beside them, as `%XX`."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.replace(b"%", b"%25").decode("utf-8", "surrogateescape").translate(_ESCAPES)


_ESCAPES = {0xDC00 + byte: f"%{byte:02X}" for byte in range(0x80, 0x100)}


def _plan_files(root: Place, names: list[bytes], rows_per_file: int) -> Plan:
    ids = [_readable(name) for name in names]
    _require_unique(pa.array(ids, pa.string()), "file names")
    shards = []
    for start in range(0, len(names), rows_per_file):
        part = slice(start, start + rows_per_file)
        shards.append(
            Shard(number=len(shards), ids=tuple(ids[part]), paths=tuple(names[part]), start=0, rows=len(names[part]))
        )
    return Plan(source=Source(root=root), shards=tuple(shards))


def _plan_parquet(
    root: Place, names: list[bytes], rows_per_file: int, keep: tuple[str, ...], image_column: str, id_column: str | None
) -> Plan:
    shards: list[Shard] = []
    fields: list[pa.Field] = []
    ids = []
    for name in names:
        label = _readable(name)
        try:
            with _open(root, name) as file:
                parquet = pq.ParquetFile(file)
                schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
                for column in [image_column, *keep, *([id_column] if id_column else [])]:
                    if column not in schema.names:
                        raise InputError(f"{label!r} has no column {column!r}; it has {', '.join(schema.names)}")
                    if schema.names.count(column) > 1:
                        raise InputError(f"{label!r} has several columns {column!r}; rename all but one")
                if id_column:
                    ids.append(parquet.read([id_column]).column(0).cast(pa.string()))
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{label!r} cannot be read as Parquet: {error}") from error
        if not _holds_bytes(schema.field(image_column).type):
            raise InputError(
                f"column {image_column!r} of {label!r} must hold image bytes (binary, or a struct with a binary field "
                f"'bytes'), got {schema.field(image_column).type}"
            )
        found = [schema.field(column) for column in keep]
        if fields and [f.type for f in fields] != [f.type for f in found]:
            raise InputError(f"{label!r} has other types in the kept columns than {_readable(names[0])!r}")
        fields = found
        for start in range(0, rows, rows_per_file):
            rows_here = min(rows_per_file, rows - start)
            shards.append(Shard(number=len(shards), ids=(), paths=(name,), start=start, rows=rows_here))
    if not shards:
        raise InputError(f"no images in {root.path!r}: its Parquet files have no rows")
    if id_column:
        column = pa.chunked_array([chunk for part in ids for chunk in part.chunks], pa.string())
        if column.null_count:
            raise InputError(f"column {id_column!r} has {column.null_count} empty ids; every image needs one")
        _require_unique(column, f"column {id_column!r}")
    else:
        _require_unique(pa.array([_readable(name) for name in names], pa.string()), "file names")
    # nullable, as another file's column of the same type may be
    kept = tuple(field.with_name(kept_name(field.name)).with_nullable(True).remove_metadata() for field in fields)
    if len({field.name for field in kept}) < len(kept):
        raise InputError(f"--keep names a column twice: in the output they would be {', '.join(f.name for f in kept)}")
    source = Source(root=root, parquet=True, image_column=image_column, id_column=id_column, keep=keep, kept=kept)
    return Plan(source=source, shards=tuple(shards))


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _require_unique(ids: pa.Array | pa.ChunkedArray, what: str) -> None:
    counts = ids.value_counts()
    repeated = counts.filter(pa.array(counts.field("counts").to_numpy() > 1))
    if len(repeated):
        example = repeated.field("values")[0].as_py()
        raise InputError(
            f"ids must be unique, but {len(repeated)} of the {what} are given more than once, such as {example!r}"
        )


def _open(root: Place, name: bytes) -> pa.NativeFile:
    if root.local:
        path = os.path.join(os.fsencode(root.path), name)
        _require_regular(os.stat(path))
        return pa.OSFile(path, "rb")
    return root.filesystem.open_input_file(f"{root.path}/{name.decode()}")


def _require_regular(info: os.stat_result) -> None:
    """Refuses pipes and devices, which may never end."""
    if not stat.S_ISREG(info.st_mode):
        raise OSError("it is not a regular file")


def read_shard(source: Source, shard: Shard, max_bytes: int, pool: Executor) -> Rows:
    """The bytes of a shard's images; a file that cannot be read becomes a row with an error."""
    return _read_parquet(source, shard) if source.parquet else _read_files(source, shard, max_bytes, pool)


def read_batches(source: Source, shard: Shard, size: int, max_bytes: int, pool: Executor) -> Iterator[Rows]:
    """A shard's rows in batches; of image files no more than one batch is held in memory at a time."""
    if source.parquet:
        yield from read_shard(source, shard, max_bytes, pool).slices(size)
        return
    for start in range(0, shard.rows, size):
        ids, paths = shard.ids[start : start + size], shard.paths[start : start + size]
        part = Shard(number=shard.number, ids=ids, paths=paths, start=0, rows=len(ids))
        yield read_shard(source, part, max_bytes, pool)


def read_rows(source: Source, rows: Sequence[Row], max_bytes: int, pool: Executor) -> Rows:
    """The bytes of single rows of any files, in the order asked for, without kept columns.

    Of Parquet only the row groups that hold any of them are read, each once, the files side by side. What cannot be
    read becomes rows with an error, be it a whole file.
    """
    if not source.parquet:
        ids = tuple(_readable(row.path) for row in rows)
        shard = Shard(number=0, ids=ids, paths=tuple(row.path for row in rows), start=0, rows=len(rows))
        return _read_files(source, shard, max_bytes, pool)
    assert not source.id_column, "only whole shards come with ids of their own"
    wanted: dict[bytes, list[int]] = {}
    for row in rows:
        wanted.setdefault(row.path, []).append(row.number)
    found = dict(zip(wanted, pool.map(lambda path: _pick(source, path, wanted[path]), wanted), strict=True))
    cells = [found[row.path][row.number] for row in rows]
    return Rows(
        ids=[f"{_readable(row.path)}#{row.number}" for row in rows],
        data=[cell if isinstance(cell, bytes) else None for cell in cells],
        errors=[cell if isinstance(cell, str) else None for cell in cells],
        kept=[],
    )


def _pick(source: Source, path: bytes, numbers: list[int]) -> dict[int, bytes | str]:
    """Some rows of a Parquet file: by number the image's bytes, or why there are none."""
    cells: dict[int, bytes | str] = dict.fromkeys(numbers, "the Parquet file has no such row any more")
    last = -1  # row before the group
    try:
        with _open(source.root, path) as file:
            parquet = pq.ParquetFile(file)
            for group in range(parquet.metadata.num_row_groups):
                first, last = last + 1, last + parquet.metadata.row_group(group).num_rows
                if here := [number for number in cells if first <= number <= last]:
                    column = parquet.read_row_group(group, columns=[source.image_column]).column(source.image_column)
                    for number in here:
                        cell = column[number - first].as_py()
                        cell = cell["bytes"] if isinstance(cell, dict) else cell
                        cells[number] = f"the column {source.image_column!r} is null here" if cell is None else cell
    except (OSError, pa.ArrowException) as error:
        reason = f"the Parquet file cannot be read: {error}"
        cells = {number: cell if isinstance(cell, bytes) else reason for number, cell in cells.items()}
    return cells


def _read_files(source: Source, shard: Shard, max_bytes: int, pool: Executor) -> Rows:
    def read(name: bytes) -> tuple[bytes | None, str | None]:
        try:
            if source.root.local:
                path = os.path.join(os.fsencode(source.root.path), name)
                with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe would block until written
                    _require_regular(os.fstat(file.fileno()))
                    return file.read(max_bytes + 1), None  # one more, so that decoding sees that it is too large
            with source.root.filesystem.open_input_stream(f"{source.root.path}/{name.decode()}") as file:
                return file.read(max_bytes + 1), None
        except OSError as error:
            return None, f"the file cannot be read: {error.strerror or error}"

    results = list(pool.map(read, shard.paths))
    return Rows(ids=list(shard.ids), data=[d for d, _ in results], errors=[e for _, e in results], kept=[])


def _read_parquet(source: Source, shard: Shard) -> Rows:
    columns = [source.image_column, *source.keep, *([source.id_column] if source.id_column else [])]
    with _open(source.root, shard.paths[0]) as file:
        table = _read_rows(pq.ParquetFile(file), list(dict.fromkeys(columns)), shard.start, shard.rows)
    chunks = table.column(source.image_column).chunks  # never combined: together they may exceed Arrow's 2 GiB
    cells = [chunk.field("bytes") if pa.types.is_struct(chunk.type) else chunk for chunk in chunks]
    data = [cell for part in cells for cell in part.to_pylist()]
    errors = [None if item is not None else f"the column {source.image_column!r} is null here" for item in data]
    if source.id_column:
        ids = table.column(source.id_column).cast(pa.string()).to_pylist()
    else:
        label = _readable(shard.paths[0])
        ids = [f"{label}#{row}" for row in range(shard.start, shard.start + shard.rows)]
    kept = [table.column(name).combine_chunks() for name in source.keep]
    return Rows(ids=ids, data=data, errors=errors, kept=kept)


def _read_rows(parquet: pq.ParquetFile, columns: list[str], start: int, count: int) -> pa.Table:
    """Some rows of a Parquet file, reading only the row groups that hold them."""
    first, groups, offset = 0, [], None
    for group in range(parquet.metadata.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if first < start + count and first + rows > start:
            groups.append(group)
            offset = start - first if offset is None else offset
        first += rows
    return parquet.read_row_groups(groups, columns=columns).slice(offset or 0, count)
