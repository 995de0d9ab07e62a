"""Image files, in folders or matched by a glob."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor

from alit.images.formats import EXTENSIONS
from jobs.sources.fetch import fetch
from jobs.sources.records import Format, Input, InputError, Row, Rows, Shard, Source, make_rows, readable


def open_files(uri: str, source: Source, names: Iterable[bytes], rows_per_file: int) -> Input:
    """Cuts a listing of image files into shards; see `Format.open`.

    Raises:
        InputError: columns are requested, which image files do not have.
    """
    if source.keep or source.id_column:
        option = "--keep" if source.keep else "--id-column"
        raise InputError(f"{option} needs a table or a list; {uri!r} holds image files, which have no columns")
    return Input(source=Source(root=source.root), shards=_shards(names, rows_per_file))


def _shards(names: Iterable[bytes], rows_per_file: int) -> Iterator[Shard]:
    paths: list[bytes] = []
    number = 0
    for name in names:
        paths.append(name)
        if len(paths) == rows_per_file:
            yield _shard(number, paths)
            paths, number = [], number + 1
    if paths:
        yield _shard(number, paths)


def _shard(number: int, paths: list[bytes]) -> Shard:
    return Shard(number=number, ids=tuple(map(readable, paths)), paths=tuple(paths), rows=len(paths))


def read_files(source: Source, shard: Shard, batch_size: int, max_bytes: int, pool: Executor) -> Iterator[Rows]:
    """Yields a shard's image files in batches; see `Format.read`."""
    for start in range(0, shard.rows, batch_size):
        batch = slice(start, start + batch_size)
        columns = [] if shard.kept is None else shard.kept.slice(start, batch_size).columns
        images = fetch(source.root, shard.paths[batch], max_bytes, pool)
        yield make_rows(shard.ids[batch], images, [column.combine_chunks() for column in columns])


def read_file_rows(source: Source, rows: Sequence[Row], max_bytes: int, pool: Executor) -> Rows:
    """Reads single image files, whose ids are their paths; see `Format.read_rows`."""
    paths = [row.path for row in rows]
    return make_rows([readable(path) for path in paths], fetch(source.root, paths, max_bytes, pool))


IMAGE_FILES = Format(
    kind="files",
    description=f"{', '.join(sorted(EXTENSIONS))} files",
    extensions=tuple(extension.encode() for extension in EXTENSIONS),
    open=open_files,
    read=read_files,
    read_rows=read_file_rows,
)
