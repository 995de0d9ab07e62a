"""Parquet and Arrow files as tables whose rows can be read by position, reading no more than holds them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.storage.path import StoragePath, require_regular
from jobs.storage.retry import as_os_error

EXTENSIONS = frozenset({".parquet", ".pq", ".arrow", ".feather", ".ipc"})


BROKEN = (OSError, pa.ArrowException, ValueError, SystemError)
"""What reading a damaged table, or one that is out of reach, raises."""


class ColumnarFile:
    """One table.

    Attributes:
        schema: of all its columns.
        groups: rows in each of the pieces that are read as a whole.
    """

    schema: pa.Schema
    groups: list[int]

    def read_group(self, group: int, columns: Sequence[str]) -> pa.Table:
        return self.read_groups([group], columns)

    def read_groups(self, groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        raise NotImplementedError

    def read(self, columns: Sequence[str], start: int, count: int) -> pa.Table:
        """`count` rows from row `start` on."""
        first, groups, offset = 0, [], 0
        for group, rows in enumerate(self.groups):
            if first < start + count and first + rows > start:
                offset = offset if groups else start - first
                groups.append(group)
            first += rows
        return self.read_groups(groups, columns).slice(offset, count)


class _Parquet(ColumnarFile):
    def __init__(self, file: pa.NativeFile) -> None:
        self.parquet = pq.ParquetFile(file, pre_buffer=True)  # few large requests
        self.schema, metadata = self.parquet.schema_arrow, self.parquet.metadata
        self.groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def read_groups(self, groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        return self.parquet.read_row_groups(list(groups), columns=list(columns))


class _Arrow(ColumnarFile):
    """Of its columns only those are decoded that are asked for; the stream format has no index and is gone through."""

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
    """Opens the table `name` below a root.

    Raises:
        OSError, pyarrow.ArrowException: it is no such file, damaged, or out of reach.
    """
    parquet = os.path.splitext(name)[1].lower() in (b".parquet", b".pq")
    with as_os_error(), _opened(root, name, mapped=not parquet) as file:
        yield _Parquet(file) if parquet else _Arrow(file)


def _opened(root: StoragePath, name: bytes, mapped: bool) -> pa.NativeFile:
    if root.local:
        path = os.path.join(os.fsencode(root.path), name)
        require_regular(os.stat(path))
        if not mapped:
            return pa.OSFile(path, "rb")
        with open(path, "rb") as plain:  # by descriptor, as pa.memory_map takes no name that is not UTF-8
            return pa.BufferReader(mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ))
    file = root.fs.open(f"{root.path}/{name.decode()}", "rb", cache_type="none")
    return pa.PythonFile(file, mode="r")
