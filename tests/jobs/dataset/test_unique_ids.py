"""Repeated ids are counted."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.dataset.unique_ids import check_ids
from jobs.storage.path import parse_uri


def test_repeated_ids_agrees_with_and_without_ray(
    ray_session: None, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated and empty ids are counted alike in this process and by Ray Data."""
    files = []
    for number, ids in enumerate((["a", "b", "c"], ["d", "b", None], ["b", "c", "e"])):
        pq.write_table(pa.table({"key": ids}), tmp_path / f"{number}.parquet")
        files.append((parse_uri(str(tmp_path)), f"{number}.parquet".encode(), "key"))
    nulls, number, example = check_ids(files, 9)
    assert (nulls, number) == (1, 2)
    assert example in ("b", "c")
    monkeypatch.setattr("jobs.dataset.unique_ids.MAX_LOCAL_IDS", 5)
    nulls, number, example = check_ids(files, 9)
    assert (nulls, number) == (1, 2)
    assert example in ("b", "c")
