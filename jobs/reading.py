"""A shard becomes rows of bytes, batch by batch: files and links, slices of tables, tars."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute

from alit.images import EXTENSIONS
from jobs.columnar import BROKEN, open_table
from jobs.fetch import Bytes, fetch
from jobs.inputs import Row, Rows, Shard, Source, readable
from jobs.storage import Unavailable, again, as_os_error, is_outage, reason

pc: Any = pyarrow.compute  # whose functions are made on import, unseen by type checkers


def read_batches(source: Source, shard: Shard, size: int, max_bytes: int, pool: Executor) -> Iterator[Rows]:
    """A shard's rows in batches; no more images than a batch holds, or a table's slice, are in memory at a time.

    What cannot be read becomes rows with an error, be it a whole table.

    Raises:
        StorageError: storage did not answer for minutes.
    """
    if source.kind == "tar":
        yield from _read_tar(source, shard, size, max_bytes)
    elif source.kind == "table":
        yield from _read_table(source, shard, size, max_bytes, pool)
    else:
        for start in range(0, shard.rows, size):
            part = slice(start, start + size)
            kept = [] if shard.kept is None else [c.combine_chunks() for c in shard.kept.slice(start, size).columns]
            yield _rows(shard.ids[part], fetch(source.root, shard.paths[part], max_bytes, pool), kept)


def read_rows(source: Source, rows: Sequence[Row], max_bytes: int, pool: Executor) -> Rows:
    """The bytes of single rows of any files, in the order asked for, without kept columns.

    Of tables only the pieces that hold any of them are read, each once, the files side by side. What cannot be read
    becomes rows with an error, be it a whole file.
    """
    if source.kind != "table":
        ids = [readable(row.path) for row in rows]
        return _rows(ids, fetch(source.root, [row.path for row in rows], max_bytes, pool))
    assert not source.id_column, "only whole shards come with ids of their own"
    wanted: dict[bytes, list[int]] = {}
    for row in rows:
        wanted.setdefault(row.path, []).append(row.number)
    found = dict(zip(wanted, pool.map(lambda path: _pick(source, path, wanted[path]), wanted), strict=True))
    cells = [found[row.path][row.number] for row in rows]
    ids = [f"{readable(row.path)}#{row.number}" for row in rows]
    return _rows(ids, _resolved(source, cells, max_bytes, pool))


def _rows(ids: Sequence[str], answers: Sequence[Bytes], kept: list[pa.Array] | None = None) -> Rows:
    data, errors = [answer.data for answer in answers], [answer.error for answer in answers]
    return Rows(ids=list(ids), data=data, errors=errors, kept=kept or [])


# -------------------------------------------------------------------- tables


def _read_table(source: Source, shard: Shard, size: int, max_bytes: int, pool: Executor) -> Iterator[Rows]:
    label = readable(shard.paths[0])
    numbered = [f"{label}#{row}" for row in range(shard.start, shard.start + shard.rows)]
    try:
        table = _slice(source, shard)
    except BROKEN as error:
        bad = Bytes(None, f"the table cannot be read: {reason(error)}")
        nothing = [pa.nulls(shard.rows, field.type) for field in source.kept]
        yield from _rows(numbered, [bad] * shard.rows, nothing).slices(size)
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
        answers = _resolved(source, cells, max_bytes, pool)
        yield _rows(ids[start : start + size], answers, [column.slice(start, size) for column in kept])


@again
def _slice(source: Source, shard: Shard) -> pa.Table:
    columns = [source.image_column, *source.keep, *([source.id_column] if source.id_column else [])]
    try:
        with open_table(source.root, shard.paths[0]) as table:
            return table.read(list(dict.fromkeys(columns)), shard.start, shard.rows)
    except OSError as error:
        _raise_if_unavailable(source, shard.paths[0], error)
        raise


def _raise_if_unavailable(source: Source, name: bytes, error: OSError) -> None:
    if not source.root.local and is_outage(error):
        raise Unavailable(f"{readable(name)!r} cannot be read: {reason(error)}") from error


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


def _resolved(source: Source, cells: list[Bytes | bytes], max_bytes: int, pool: Executor) -> list[Bytes]:
    links = [cell for cell in cells if isinstance(cell, bytes)]
    followed = iter(fetch(source.root, links, max_bytes, pool) if links else ())
    return [next(followed) if isinstance(cell, bytes) else cell for cell in cells]


@again
def _pick(source: Source, path: bytes, numbers: list[int]) -> dict[int, Bytes | bytes]:
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
            _raise_if_unavailable(source, path, error)
        bad = Bytes(None, f"the table cannot be read: {reason(error)}")
        cells = {n: cell if isinstance(cell, bytes) or cell.data is not None else bad for n, cell in cells.items()}
    return cells


# -------------------------------------------------------------------- tars


class _Header(tarfile.TarInfo):
    """Raises at a damaged header, where tarfile would take it for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # pyright: ignore[reportAttributeAccessIssue]
            raise tarfile.ReadError(f"a damaged header: {error}") from error


def _read_tar(source: Source, shard: Shard, size: int, max_bytes: int) -> Iterator[Rows]:
    """The samples of a tar, from front to back: files that follow each other and differ in their extensions alone."""
    label = readable(shard.paths[0])
    ids: list[str] = []
    answers: list[Bytes] = []
    kept: list[list[str | None]] = []
    seen: dict[str, int] = {}
    problem = None
    samples = _samples(source, shard.paths[0], max_bytes)
    while True:
        try:
            sample = next(samples, None)
        except (tarfile.TarError, EOFError, OSError) as error:
            if isinstance(error, OSError):
                _raise_if_unavailable(source, shard.paths[0], error)
            problem = Bytes(None, f"the tar ends too early or is damaged: {reason(error)}")
            sample = None
        if sample is None:
            if problem is not None:
                ids.append(f"{label}#end")
                answers.append(problem)
                kept.append([None] * len(source.keep))
            if ids:
                yield _rows(ids, answers, _strings(kept, len(source.keep)))
            return
        name, answer, texts = sample
        seen[name] = seen.get(name, 0) + 1
        ids.append(f"{label}/{name}" + (f"#{seen[name]}" if seen[name] > 1 else ""))
        answers.append(answer)
        kept.append(texts)
        if len(ids) == size:
            yield _rows(ids, answers, _strings(kept, len(source.keep)))
            ids, answers, kept = [], [], []


def _strings(rows: list[list[str | None]], columns: int) -> list[pa.Array]:
    return [pa.array([row[i] for row in rows], pa.string()) for i in range(columns)]


def _samples(source: Source, path: bytes, max_bytes: int) -> Iterator[tuple[str, Bytes, list[str | None]]]:
    """Every sample's image's name, its bytes, and the texts to keep."""
    pictures = {extension[1:] for extension in EXTENSIONS}
    wanted = pictures if source.image_column == "image" else {source.image_column.lower()}
    with as_os_error(), _opened(source, path) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar:
        key: str | None = None
        image: tuple[str, Bytes] | None = None
        texts: dict[str, str] = {}
        others: list[str] = []

        def finished() -> Iterator[tuple[str, Bytes, list[str | None]]]:
            if key is not None:
                nothing = Bytes(None, f"there is no image beside {', '.join(others) or 'nothing'}")
                yield *(image or (key, nothing)), [texts.get(name) for name in source.keep]

        members, problem = iter(tar), None
        while True:
            try:
                if (member := next(members, None)) is None:
                    break
            except (tarfile.TarError, EOFError, OSError) as error:
                problem = error  # what came before it is whole
                break
            name = readable(os.fsencode(member.name))
            folder, _, base = name.rpartition("/")
            if not (member.isfile() or member.islnk()) or base.startswith("."):
                continue
            stem, _, extension = base.partition(".")
            here = f"{folder}/{stem}" if folder else stem
            picture = extension.lower() in wanted
            if here != key or (picture and image is not None):  # a second image is a sample of its own
                yield from finished()
                key, image, texts, others = here, None, {}, []
            if member.islnk():
                if picture:
                    image = name, Bytes(None, f"it is a link to {readable(os.fsencode(member.linkname))}")
                continue
            content: Any = tar.extractfile(member)
            if picture:
                image = name, Bytes(content.read(max_bytes + 1), None)
            elif extension in source.keep:
                texts[extension] = content.read(max_bytes).decode("utf-8", "replace")
            else:
                others.append(base)
        yield from finished()
        if problem is not None:
            raise problem
        if tar.fileobj is not None and tar.fileobj.tell() == tar.offset:  # nothing where tarfile looked for more
            raise EOFError("the mark of its end is missing")


def _opened(source: Source, path: bytes) -> Any:
    if source.root.local:
        return open(os.path.join(os.fsencode(source.root.path), path), "rb")
    return source.root.fs.open(f"{source.root.path}/{path.decode()}", "rb", block_size=16 << 20)
