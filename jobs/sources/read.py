"""A shard becomes rows of bytes, batch by batch: files and links, slices of tables, tars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

from jobs.sources.fetch import fetch
from jobs.sources.records import Row, Rows, Shard, Source, make_rows, readable
from jobs.sources.tables import pick_cells, read_table, resolve_links
from jobs.sources.tars import read_tar


def read_batches(source: Source, shard: Shard, size: int, max_bytes: int, pool: Executor) -> Iterator[Rows]:
    """A shard's rows in batches; no more images than a batch holds, or a table's slice, are in memory at a time.

    What cannot be read becomes rows with an error, be it a whole table.

    Raises:
        StorageError: storage did not answer for minutes.
    """
    if source.kind == "tar":
        yield from read_tar(source, shard, size, max_bytes)
    elif source.kind == "table":
        yield from read_table(source, shard, size, max_bytes, pool)
    else:
        for start in range(0, shard.rows, size):
            part = slice(start, start + size)
            kept = [] if shard.kept is None else [c.combine_chunks() for c in shard.kept.slice(start, size).columns]
            yield make_rows(shard.ids[part], fetch(source.root, shard.paths[part], max_bytes, pool), kept)


def read_rows(source: Source, rows: Sequence[Row], max_bytes: int, pool: Executor) -> Rows:
    """The bytes of single rows of any files, in the order asked for, without kept columns.

    Of tables only the pieces that hold any of them are read, each once, the files side by side. What cannot be read
    becomes rows with an error, be it a whole file.
    """
    if source.kind != "table":
        ids = [readable(row.path) for row in rows]
        return make_rows(ids, fetch(source.root, [row.path for row in rows], max_bytes, pool))
    assert not source.id_column, "only whole shards come with ids of their own"
    wanted: dict[bytes, list[int]] = {}
    for row in rows:
        wanted.setdefault(row.path, []).append(row.number)
    found = dict(zip(wanted, pool.map(lambda path: pick_cells(source, path, wanted[path]), wanted), strict=True))
    cells = [found[row.path][row.number] for row in rows]
    ids = [f"{readable(row.path)}#{row.number}" for row in rows]
    return make_rows(ids, resolve_links(source, cells, max_bytes, pool))
