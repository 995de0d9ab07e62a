"""Parquet and Arrow files as tables whose rows can be read by position, reading no more than holds them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.storage import Place, as_os_error

EXTENSIONS = frozenset({".parquet", ".pq", ".arrow", ".feather", ".ipc"})
BROKEN = (OSError, pa.ArrowException)
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
    """Of the stream format, which has no index, all batches are gone through: for nothing but a look where mapped."""

    def __init__(self, file: pa.NativeFile) -> None:
        reader: pa.RecordBatchFileReader | None = None
        try:
            reader = pa.ipc.open_file(file)
        except pa.ArrowInvalid:
            file.seek(0)
            stream = pa.ipc.open_stream(file)
            self.schema, self.batches = stream.schema, list(stream)
        else:
            self.schema = reader.schema
            self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.groups = [len(batch) for batch in self.batches]

    def read_groups(self, groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        schema = pa.schema([self.schema.field(name) for name in columns])
        return pa.Table.from_batches([self.batches[i].select(list(columns)) for i in groups], schema)


@contextmanager
def open_table(root: Place, name: bytes) -> Iterator[ColumnarFile]:
    """Opens the table `name` below a root.

    Raises:
        OSError, pyarrow.ArrowException: it is no such file, damaged, or out of reach.
    """
    parquet = os.path.splitext(name)[1].lower() in (b".parquet", b".pq")
    with as_os_error(), _opened(root, name, mapped=not parquet) as file:
        yield _Parquet(file) if parquet else _Arrow(file)


def _opened(root: Place, name: bytes, mapped: bool) -> pa.NativeFile:
    if root.local:
        path = os.path.join(os.fsencode(root.path), name)
        require_regular(os.stat(path))
        return pa.memory_map(os.fsdecode(path)) if mapped else pa.OSFile(path, "rb")
    file = root.fs.open(f"{root.path}/{name.decode()}", "rb", cache_type="none")
    return pa.PythonFile(file, mode="r")


def require_regular(info: os.stat_result) -> None:
    """Refuses pipes and devices, which may never end.

    Raises:
        OSError: it is one.
    """
    if not stat.S_ISREG(info.st_mode):
        raise OSError("it is not a regular file")
