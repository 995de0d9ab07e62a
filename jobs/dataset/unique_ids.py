"""Duplicate and missing ids: in this process for few, with Ray Data for many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute

from jobs.runtime.session import ray_session
from jobs.sources.columnar import READ_ERRORS, open_table
from jobs.sources.records import InputError, readable
from jobs.sources.tables import READERS
from jobs.storage.path import StoragePath
from jobs.storage.retry import UnavailableError, as_os_error, is_outage, reason, retry_while_unavailable

pc: Any = pyarrow.compute  # whose functions are made on import, unseen by type checkers


IDS_AT_ONCE = 2_000_000
"""Ids that are compared in this process; more of them by Ray Data."""


IdFile = tuple[StoragePath, bytes, str]
"""A root, a table's name below it, and its column of ids, or of lists of them."""


def repeated_ids(files: Sequence[IdFile], images: int) -> tuple[int, int, str | None]:
    """How many ids are missing, how many are there more than once, and one of these; of many ids by Ray Data."""
    if images > IDS_AT_ONCE:
        return _count_with_ray(files)
    with ThreadPoolExecutor(READERS) as pool:
        ids = pa.chunked_array(
            [chunk for table in pool.map(_ids, files) for chunk in table.column("id").chunks], pa.string()
        )
    counts = ids.drop_null().value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    return ids.null_count, len(repeated), repeated.field("values")[0].as_py() if len(repeated) else None


@retry_while_unavailable
def _ids(file: IdFile) -> pa.Table:
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


def _count_with_ray(files: Sequence[IdFile]) -> tuple[int, int, str | None]:
    """How many ids are missing, how many are there more than once, and one of these."""

    def load(batch: pa.Table) -> Iterator[pa.Table]:
        for number in batch.column("file").to_pylist():
            yield _ids(files[number])

    def suspicious(table: pa.Table) -> pa.Table:
        return table.filter(pc.or_kleene(pc.greater(table.column("count"), 1), pc.is_null(table.column("id"))))

    nulls, number, example = 0, 0, None
    with ray_session() as ray:
        from ray.data.aggregate import Count

        ray.data.DataContext.get_current().target_max_block_size = 64 << 20
        dataset = ray.data.from_arrow([pa.table({"file": [i]}) for i in range(len(files))])
        ids = dataset.map_batches(load, batch_size=1, batch_format="pyarrow", num_cpus=0.25)
        counts = ids.groupby("id").aggregate(Count(alias_name="count"))
        for row in counts.map_batches(suspicious, batch_format="pyarrow", num_cpus=0.25).iter_rows():
            if row["id"] is None:
                nulls += row["count"]
            else:
                number, example = number + 1, row["id"]
    return nulls, number, example
