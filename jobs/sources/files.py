"""Folders and globs of image files, cut into shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jobs.sources.records import Shard, readable


def file_shards(names: Iterable[bytes], rows_per_file: int) -> Iterator[Shard]:
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
