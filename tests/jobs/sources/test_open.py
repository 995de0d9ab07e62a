"""Every form of input is recognized and gives the same images; what is no input is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from inputs import (
    COUNT,
    IMAGES,
    LABELS,
    arrow_file,
    arrow_stream,
    bytes_parquet,
    data_by_id,
    formatted,
    jsonl,
    links_parquet,
    plan_of,
    read_everything,
    refusal,
    stored_plan,
    struct_parquet,
    write_files,
    write_table,
)

FORMS: list[Callable[[Path], str]] = [
    bytes_parquet,
    struct_parquet,
    links_parquet,
    arrow_file,
    arrow_stream,
    jsonl,
]


@pytest.mark.parametrize("form", FORMS)
def test_open_input_reads_every_form_alike(photos: Path, tmp_path: Path, form: Any) -> None:
    """Every form of table and list gives the same images, ids and nested columns."""
    plan = stored_plan(str(photos / form(photos)), tmp_path, id_column="key", keep=["label"])
    ids, data, errors, kept = read_everything(plan)
    assert ids == formatted("k{}")
    assert data == IMAGES
    assert errors == [None] * COUNT
    assert kept == [LABELS]
    assert (plan.images, plan.shards) == (COUNT, 3)
    assert plan.source.kept[0].type.field("boxes").type == pa.list_(pa.int64())


def test_open_input_accepts_a_single_file(tmp_path: Path) -> None:
    """A single image or a single table is an input, under its file's name."""
    write_files(tmp_path, "a b.jpg", "other.jpg")
    assert data_by_id(plan_of(tmp_path / "a b.jpg")) == {"a b.jpg": b"a b.jpg"}
    path = write_table(tmp_path / "t.parquet", 3)
    expected = {f"t.parquet#{row}": f"t.parquet {row}".encode() for row in range(3)}
    assert data_by_id(plan_of(path)) == data_by_id(plan_of(f"file://{path}")) == expected


def test_open_input_refuses_an_input_without_images(tmp_path: Path) -> None:
    """An input without images is refused."""
    assert "no images in" in refusal(tmp_path)
    write_files(tmp_path, "a.dat", "b/.jpg")
    assert ".jpeg" in refusal(tmp_path)
    assert "no images in" in refusal(tmp_path / "a.dat")
    assert "no images in" in refusal(tmp_path / "*.png")


def test_open_input_refuses_table_options_for_files(tmp_path: Path) -> None:
    """Options about columns are refused for image files."""
    write_files(tmp_path, "a.jpg")
    assert "--keep needs a table or a list" in refusal(tmp_path, keep=["label"])
    assert "--id-column needs a table or a list" in refusal(tmp_path, id_column="label")


@pytest.mark.parametrize("rows", [0, -3])
def test_open_input_refuses_shards_without_rows(tmp_path: Path, rows: int) -> None:
    """The number of rows per file must be at least 1."""
    assert f"--rows-per-file must be at least 1, got {rows}" in refusal(tmp_path, rows)
