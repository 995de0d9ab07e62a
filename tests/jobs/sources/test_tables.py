"""Parquet and Arrow tables: columns, ids, shards and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import IMAGES, data_by_id, plan_of, read_everything, read_shards, refusal, stored_plan, write_table


def test_tables_take_null_structs_for_null(tmp_path: Path) -> None:
    """A null struct is null even where its child holds bytes."""
    kind = pa.struct({"bytes": pa.binary()})
    cells = pa.StructArray.from_arrays(
        [pa.array(IMAGES[:3], pa.binary())], fields=list(kind), mask=pa.array([False, True, False])
    )
    with pa.ipc.new_file(tmp_path / "t.arrow", pa.schema({"image": kind})) as file:
        file.write_table(pa.table({"image": cells}))
    assert read_everything(stored_plan(str(tmp_path / "t.arrow"), tmp_path / "out"))[1] == [IMAGES[0], None, IMAGES[2]]


def test_tables_of_a_folder_are_read_in_order(tmp_path: Path) -> None:
    """The tables of a folder are read in the order of their names."""
    write_table(tmp_path / "b.parquet", 3)
    write_table(tmp_path / "a" / "z.PARQUET", 2)
    assert [name for part in read_shards(plan_of(tmp_path)) for name in part.ids] == [
        *("a/z.PARQUET#0", "a/z.PARQUET#1", "b.parquet#0", "b.parquet#1", "b.parquet#2")
    ]


def test_tables_may_have_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A table whose name is not UTF-8 can be read."""
    write_table(tmp_path / "t.parquet", 1).rename(tmp_path / "\udcff.parquet")
    assert data_by_id(plan_of(tmp_path)) == {"%FF.parquet#0": b"t.parquet 0"}


@pytest.mark.parametrize("rows_per_file", [1, 2, 3, 4, 7, 11, 50])
def test_table_shards_read_rows_across_row_groups(tmp_path: Path, rows_per_file: int) -> None:
    """A shard of a table reads exactly its rows, wherever row groups begin and end."""
    write_table(tmp_path / "t.parquet", 11, row_group_size=3, label=list(range(11)))
    plan = plan_of(tmp_path, rows_per_file, keep=["label"])
    assert data_by_id(plan) == {f"t.parquet#{row}": f"t.parquet {row}".encode() for row in range(11)}
    assert [value for part in read_shards(plan) for value in part.kept[0].to_pylist()] == list(range(11))


def test_tables_of_structs_hold_bytes_or_paths(tmp_path: Path) -> None:
    """Cells of bytes and path give their bytes or the file beside the table, and null cells an error."""
    cells = [{"bytes": b"1", "path": "p"}, {"bytes": None, "path": "q"}, None, {"bytes": b"4", "path": None}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "t.parquet", row_group_size=3)
    (tmp_path / "q").write_bytes(b"beside the table")
    (rows,) = read_shards(plan_of(tmp_path, 10))
    assert rows.data == [b"1", b"beside the table", None, b"4"]
    assert [error is None for error in rows.errors] == [True, True, False, True]
    assert "'image' is null" in str(rows.errors[2])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_tables_report_null_cells_as_errors(tmp_path: Path, kind: pa.DataType) -> None:
    """A null cell in the image column becomes a row with an error."""
    pq.write_table(pa.table({"photo": pa.array([b"1", None, b"3"], kind)}), tmp_path / "t.parquet")
    (rows,) = read_shards(plan_of(tmp_path, 10, image_column="photo"))
    assert rows.data == [b"1", None, b"3"]
    assert rows.errors[1] == "the column 'photo' is null here"


def test_tables_take_ids_from_a_column_of_any_plain_type(tmp_path: Path) -> None:
    """Ids may come from a column of numbers, as text."""
    write_table(tmp_path / "t.parquet", 3, key=pa.array([7, 5, 6], pa.int32()))
    assert list(data_by_id(plan_of(tmp_path, id_column="key"))) == ["7", "5", "6"]


def test_tables_refuse_a_missing_column(tmp_path: Path) -> None:
    """A missing column is refused, with the columns that exist."""
    write_table(tmp_path / "t.parquet", label=list("abcde"))
    for options in ({"image_column": "jpg"}, {"keep": ["jpg"]}, {"id_column": "jpg"}):
        assert "has no column 'jpg'; it has image, label" in refusal(tmp_path, **options)


def test_tables_refuse_a_duplicate_column(tmp_path: Path) -> None:
    """A table that has the image column twice is refused."""
    pq.write_table(pa.table([pa.array([b"1"]), pa.array([b"2"])], ["image", "image"]), tmp_path / "t.parquet")
    assert "'t.parquet' has several columns 'image'" in refusal(tmp_path)


def test_tables_refuse_an_image_column_without_bytes(tmp_path: Path) -> None:
    """An image column of another type than bytes is refused, with its type."""
    write_table(tmp_path / "t.parquet", label=list(range(5)), url=[{"path": "x"}] * 5)
    assert "must hold image bytes" in (message := refusal(tmp_path, image_column="label"))
    assert "int64" in message
    assert "must hold image bytes" in refusal(tmp_path, image_column="url")


def test_tables_refuse_unreadable_files(tmp_path: Path) -> None:
    """A table that is cut, a pipe or a broken link is refused."""
    path = write_table(tmp_path / "cut.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    assert "'cut.parquet' cannot be read as a table" in refusal(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in refusal(tmp_path)
    path.unlink()
    path.symlink_to("nowhere")
    assert "cannot be read as a table" in refusal(tmp_path)


def test_tables_without_rows_are_skipped(tmp_path: Path) -> None:
    """Tables without rows are skipped, and refused where there are no others."""
    write_table(tmp_path / "a.parquet", 0)
    assert "have no rows" in refusal(tmp_path)
    write_table(tmp_path / "b.parquet", 2)
    assert set(data_by_id(plan_of(tmp_path))) == {"b.parquet#0", "b.parquet#1"}
