"""Reads the bytes of images: those of a shard batch by batch, or single rows of an input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

from jobs.sources.formats import format_of
from jobs.sources.records import Row, Rows, Shard, Source


def read_batches(source: Source, shard: Shard, batch_size: int, max_bytes: int, pool: Executor) -> Iterator[Rows]:
    """Yields a shard's rows in batches; at most one batch, or one slice of a table, is in memory at a time.

    Images that cannot be read become rows with an error, even if that is all of a table.

    Args:
        source: How the shard is read.
        shard: The shard.
        batch_size: Maximum number of rows per batch.
        max_bytes: Maximum number of bytes per image; one more is read of larger images, so that decoding rejects them.
        pool: Executor for concurrent reads.

    Raises:
        StorageError: the storage was unavailable for `jobs.storage.retry.RETRY_SECONDS`.
    """
    return format_of(source).read(source, shard, batch_size, max_bytes, pool)


def read_rows(source: Source, rows: Sequence[Row], max_bytes: int, pool: Executor) -> Rows:
    """Reads single rows of any files, in the given order, without kept columns.

    Of a table only the row groups that hold any of them are read, each once, and several files at the same time.
    Images that cannot be read become rows with an error, even if that is all of a file.

    Args:
        source: How the files are read; not tars, which can only be read from front to back.
        rows: The images.
        max_bytes: Maximum number of bytes per image, see `read_batches`.
        pool: Executor for concurrent reads.

    Raises:
        StorageError: the storage was unavailable for `jobs.storage.retry.RETRY_SECONDS`.
    """
    read = format_of(source).read_rows
    assert read is not None, source.kind
    return read(source, rows, max_bytes, pool)
