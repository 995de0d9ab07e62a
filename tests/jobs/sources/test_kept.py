"""Columns that are kept beside the tokens."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import IMAGES, plan_of, read_everything, read_shards, refusal, stored_plan, write_table

from jobs.sources.records import InputError


def test_kept_columns_convert_views_and_refuse_others(tmp_path: Path) -> None:
    """Kept string views become plain strings, and types that Parquet cannot hold are refused."""
    views = pa.array(["a", None, "c"], pa.string_view())
    table = pa.table({"image": IMAGES[:3], "v": views, "e": pa.array([{}] * 3, pa.struct([])), "l": [[1], [2], [3]]})
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as file:
        file.write_table(table)
    plan = stored_plan(str(tmp_path / "t.arrow"), tmp_path / "1", keep=["v"])
    assert plan.source.kept[0].type == pa.large_string()
    assert read_everything(plan)[3] == [["a", None, "c"]]
    for options, words in (({"keep": ["e"]}, "cannot be kept"), ({"id_column": "l"}, "must hold text or numbers")):
        with pytest.raises(InputError, match=words):
            stored_plan(str(tmp_path / "t.arrow"), tmp_path / "2", **options)


def test_kept_columns_keep_types_and_prefix_collisions(tmp_path: Path) -> None:
    """Kept columns keep their types, and names that collide with ours get a prefix."""
    boxes = pa.array(
        [[{"x": 1, "tags": ["a"]}], [], None], pa.list_(pa.struct({"x": pa.int8(), "tags": pa.list_(pa.string())}))
    )
    label = pa.array(["cat", None, "dog"]).dictionary_encode()
    when = pa.array([1, 2, 3], pa.timestamp("ms", tz="UTC"))
    write_table(tmp_path / "t.parquet", 3, boxes=boxes, label=label, width=[1, 2, 3], when=when)
    plan = plan_of(tmp_path, 2, keep=["boxes", "width", "label", "when"])
    assert [(field.name, field.type) for field in plan.source.kept] == [
        ("boxes", boxes.type),
        ("input_width", pa.int64()),
        ("label", label.type),
        ("when", when.type),
    ]
    first, second = read_shards(plan)
    assert first.kept[0].to_pylist() + second.kept[0].to_pylist() == boxes.to_pylist()
    assert first.kept[2].to_pylist() + second.kept[2].to_pylist() == ["cat", None, "dog"]


def test_kept_columns_are_nullable(tmp_path: Path) -> None:
    """A kept column may be nullable in one file only, and is nullable in the output."""
    write_table(tmp_path / "a.parquet", 2, label=pa.array([None, "x"]))
    strict = pa.schema([pa.field("image", pa.binary()), pa.field("label", pa.string(), nullable=False)])
    pq.write_table(pa.table({"image": [b"1"], "label": ["y"]}, strict), tmp_path / "b.parquet")
    assert all(field.nullable for field in plan_of(tmp_path, keep=["label"]).source.kept)


def test_kept_columns_refuse_duplicates(tmp_path: Path) -> None:
    """A column that would be twice in the output is refused."""
    write_table(tmp_path / "t.parquet", id=[1] * 5, input_id=[2] * 5)
    assert "twice" in refusal(tmp_path, keep=["id", "id"])
    assert "input_id, input_id" in refusal(tmp_path, keep=["id", "input_id"])


def test_kept_columns_refuse_differing_types(tmp_path: Path) -> None:
    """A kept column must have the same type in every table."""
    write_table(tmp_path / "a.parquet", label=[1] * 5)
    write_table(tmp_path / "b.parquet", label=["x"] * 5)
    assert "'b.parquet' has other types" in refusal(tmp_path, keep=["label"])
