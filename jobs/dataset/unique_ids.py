"""Duplicate and missing ids: counted in this process up to a limit, and with Ray Data above it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute

from jobs.runtime.session import ray_session
from jobs.sources.columnar import READ_ERRORS, open_table
from jobs.sources.records import InputError, readable
from jobs.sources.tables import READERS
from jobs.storage.path import StoragePath
from jobs.storage.retry import UnavailableError, as_os_error, is_outage, reason, retry_while_unavailable

pc: Any = pyarrow.compute  # its functions are created on import, out of sight of type checkers

MAX_LOCAL_IDS = 2_000_000
"""Above this number of ids, Ray Data compares them."""


class IdFile(NamedTuple):
    """A table with ids."""

    root: StoragePath
    name: bytes
    """The table's path below the root."""
    column: str
    """Its column of ids, or of lists of ids."""


class IdCheck(NamedTuple):
    """Faults among ids."""

    missing: int
    repeated: int
    """Number of distinct ids that occur more than once."""
    example: str | None
    """One of those."""


def check_ids(files: Sequence[IdFile], images: int) -> IdCheck:
    """Counts missing and repeated ids.

    Args:
        files: The tables with the ids.
        images: Number of ids in them, which decides where they are compared.

    Raises:
        InputError: A column cannot be read.
        UnavailableError: Storage did not respond.
    """
    if images > MAX_LOCAL_IDS:
        return _check_with_ray(files)
    with ThreadPoolExecutor(READERS) as pool:
        ids = pa.chunked_array(
            [chunk for table in pool.map(_read_ids, files) for chunk in table.column("id").chunks], pa.string()
        )
    counts = ids.drop_null().value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    return IdCheck(ids.null_count, len(repeated), repeated.field("values")[0].as_py() if len(repeated) else None)


@retry_while_unavailable
def _read_ids(file: IdFile) -> pa.Table:
    root, name, column = file
    try:
        with as_os_error(), open_table(root, name) as table:
            ids = table.read_groups(range(len(table.groups)), [column]).column(0)
        if pa.types.is_list(ids.type):
            ids = pc.list_flatten(ids)
        return pa.table({"id": ids.cast(pa.string())})
    except READ_ERRORS as error:
        outage = isinstance(error, OSError) and not root.local and is_outage(error)
        kind = UnavailableError if outage else InputError
        raise kind(f"the column {column!r} of {readable(name)!r} cannot be read: {reason(error)}") from error


def _check_with_ray(files: Sequence[IdFile]) -> IdCheck:
    def read_files(batch: pa.Table) -> Iterator[pa.Table]:
        for number in batch.column("file").to_pylist():
            yield _read_ids(files[number])

    def faulty(table: pa.Table) -> pa.Table:
        return table.filter(pc.or_kleene(pc.greater(table.column("count"), 1), pc.is_null(table.column("id"))))

    missing, repeated, example = 0, 0, None
    with ray_session() as ray:
        from ray.data.aggregate import Count

        ray.data.DataContext.get_current().target_max_block_size = 64 << 20
        dataset = ray.data.from_arrow([pa.table({"file": [i]}) for i in range(len(files))])
        ids = dataset.map_batches(read_files, batch_size=1, batch_format="pyarrow", num_cpus=0.25)
        counts = ids.groupby("id").aggregate(Count(alias_name="count"))
        for row in counts.map_batches(faulty, batch_format="pyarrow", num_cpus=0.25).iter_rows():
            if row["id"] is None:
                missing += row["count"]
            else:
                repeated, example = repeated + 1, row["id"]
    return IdCheck(missing, repeated, example)
