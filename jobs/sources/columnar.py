"""Parquet and Arrow files, of which single row groups and slices of rows are read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.storage.path import StoragePath, require_regular
from jobs.storage.retry import as_os_error

PARQUET_EXTENSIONS = (b".parquet", b".pq")


ARROW_EXTENSIONS = (b".arrow", b".feather", b".ipc")


READ_ERRORS = (OSError, pa.ArrowException, ValueError, SystemError)
"""The exceptions that reading raises if a table is damaged or cannot be accessed."""


class ColumnarFile:
    """An open table.

    Attributes:
        schema: The schema of all its columns.
        groups: The number of rows in each of its groups, the smallest pieces that can be read.
    """

    schema: pa.Schema
    groups: list[int]

    def read_groups(self, groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Reads some columns of the groups with the given indices."""
        raise NotImplementedError

    def read(self, columns: Sequence[str], start: int, count: int) -> pa.Table:
        """Reads some columns of `count` rows from row `start` on."""
        first_row, groups, offset = 0, [], 0
        for group, rows in enumerate(self.groups):
            if first_row < start + count and first_row + rows > start:
                offset = offset if groups else start - first_row
                groups.append(group)
            first_row += rows
        return self.read_groups(groups, columns).slice(offset, count)


class _Parquet(ColumnarFile):
    def __init__(self, file: pa.NativeFile) -> None:
        self.parquet = pq.ParquetFile(file, pre_buffer=True)  # fewer, larger requests
        self.schema, metadata = self.parquet.schema_arrow, self.parquet.metadata
        self.groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def read_groups(self, groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        return self.parquet.read_row_groups(list(groups), columns=list(columns))


class _Arrow(ColumnarFile):
    """An Arrow file or stream; only the requested columns are decoded. A stream is always read from its start."""

    def __init__(self, file: pa.NativeFile) -> None:
        self.file = file
        try:
            self.schema, self.stream = pa.ipc.open_file(file).schema, False
        except pa.ArrowInvalid:
            file.seek(0)
            self.schema, self.stream = pa.ipc.open_stream(file).schema, True
        fixed = [i for i, field in enumerate(self.schema) if pa.types.is_primitive(field.type)]
        self.groups = [len(batch) for batch in self._batches((fixed or [0])[:1], None)]

    def _batches(self, fields: list[int], groups: Sequence[int] | None) -> Iterator[pa.RecordBatch]:
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        self.file.seek(0)
        if not self.stream:
            reader = pa.ipc.open_file(self.file, options=options)
            yield from map(reader.get_batch, range(reader.num_record_batches) if groups is None else groups)
            return
        for number, batch in enumerate(pa.ipc.open_stream(self.file, options=options)):
            if groups is None or number in groups:
                yield batch

    def read_groups(self, groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        fields = sorted(self.schema.get_field_index(name) for name in columns)
        schema = pa.schema([self.schema.field(i) for i in fields])
        table = pa.Table.from_batches(self._batches(fields, groups), schema)
        table.validate(full=True)
        return table.select(list(columns))


@contextmanager
def open_table(root: StoragePath, name: bytes) -> Iterator[ColumnarFile]:
    """Opens a Parquet or Arrow file.

    Args:
        root: The folder that the name is relative to.
        name: The file's name; its extension decides the format.

    Raises:
        OSError: the file cannot be accessed, or is not a regular file.
        pyarrow.ArrowException: the file is damaged.
    """
    if root.local:
        require_regular(os.stat(root.file_path(name)))
    is_parquet = name.lower().endswith(PARQUET_EXTENSIONS)
    mapped = root.local and not is_parquet
    with as_os_error(), _open_mapped(root, name) if mapped else root.open_arrow(name) as file:
        yield _Parquet(file) if is_parquet else _Arrow(file)


def _open_mapped(root: StoragePath, name: bytes) -> pa.NativeFile:
    # by file descriptor, as pa.memory_map does not accept names that are not UTF-8
    with root.open_stream(name) as file:
        return pa.BufferReader(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
