"""Rows and single cells of an input are read; damaged ones become errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from inputs import IMAGES, arrow_file, bytes_parquet, jsonl, links_parquet

from jobs.sources.open import open_input
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
