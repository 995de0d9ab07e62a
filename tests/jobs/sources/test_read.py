"""Rows and single cells of an input are read; damaged ones become errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feeds import table_of
from image_files import blocks_image
from inputs import IMAGES, arrow_file, bytes_parquet, jsonl, links_parquet

from jobs.sources.open import make_plan, open_input
from jobs.sources.read import read_rows
from jobs.sources.records import Plan, Row


@pytest.mark.parametrize("form", [bytes_parquet, arrow_file, links_parquet, jsonl])
def test_read_rows_reads_rows_in_any_order(photos: Path, form: Any) -> None:
    """Single rows of an input are read in any order, repeated ones too."""
    found = open_input(str(photos / form(photos)), rows_per_file=3)
    plan = Plan(source=found.source, shards=tuple(found.shards))
    numbers = [5, 0, 3, 5]
    if plan.source.sliced:
        rows = [Row(plan.shards[0].paths[0], number) for number in numbers]
    else:
        rows = [Row([path for shard in plan.shards for path in shard.paths][number], 0) for number in numbers]
    with ThreadPoolExecutor(4) as pool:
        assert read_rows(plan.source, rows, 10_000, pool).data == [IMAGES[number] for number in numbers]


def test_read_rows_reads_each_row_group_once(tmp_path, monkeypatch):
    """Of a Parquet file, only the row groups of the requested rows are read, each once."""
    folder = table_of(tmp_path / "in", [f"image {i}".encode() for i in range(9)])
    source = make_plan(str(folder), rows_per_file=100).source
    groups, read = [], pq.ParquetFile.read_row_groups

    def counted(self: pq.ParquetFile, asked: list[int], columns: list[str]) -> pa.Table:
        groups.extend(asked)
        return read(self, asked, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    wanted = [7, 2, 6, 2, 7, 8]
    with ThreadPoolExecutor(2) as pool:
        rows = read_rows(source, [Row(b"000.parquet", number) for number in wanted], 1000, pool)
    assert rows.data == [f"image {number}".encode() for number in wanted]
    assert rows.ids == [f"000.parquet#{number}" for number in wanted]
    assert groups == [1, 3, 4]


def test_read_rows_reports_damaged_tables_as_errors(tmp_path):
    """Tables that were damaged or shortened since planning give rows with errors."""
    folder = table_of(tmp_path / "in", [blocks_image(i) for i in range(27)])
    source = make_plan(str(folder), rows_per_file=100).source
    (folder / "009.parquet").write_bytes(b"text")
    pq.write_table(pa.table({"image": pa.array([b"1"])}), folder / "018.parquet")
    wanted = [Row(name, number) for name in (b"000.parquet", b"009.parquet", b"018.parquet") for number in (0, 5)]
    with ThreadPoolExecutor(2) as pool:
        rows = read_rows(source, wanted, 1000, pool)
    assert [data is not None for data in rows.data] == [True, True, False, False, True, False]
    assert "the table cannot be read" in str(rows.errors[2])
    assert rows.errors[5] == "the table has no such row any more"
