"""The stored plan: limits, unique ids, and the way back from the job's record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from inputs import (
    IMAGES,
    bytes_parquet,
    jsonl,
    read_everything,
    refusal,
    stored_plan,
    write_files,
    write_table,
    write_tar,
)

from jobs.dataset.plan import plan_of_record, write_plan
from jobs.sources.open import open_input
from jobs.sources.records import InputError
from jobs.storage.path import parse_uri


def test_write_plan_limit_takes_the_first_images(photos: Path, tmp_path: Path) -> None:
    """A limit takes the first images of every countable input and is refused for tars."""
    for i, form in enumerate((lambda folder: "files", bytes_parquet, jsonl)):
        plan = stored_plan(str(photos / form(photos)), tmp_path / str(i), limit=5)
        assert read_everything(plan)[1] == IMAGES[:5]
        assert (plan.images, plan.shards) == (5, 2)
    write_tar(tmp_path / "a.tar")
    with pytest.raises(InputError, match="--limit needs"):
        stored_plan(str(tmp_path / "a.tar"), tmp_path / "t", limit=5)


def test_plan_of_record_restores_the_plan(photos: Path, tmp_path: Path) -> None:
    """A stored plan is the same when it is read from the job's record."""
    for name in ("files", bytes_parquet(photos), jsonl(photos)):
        options: dict[str, Any] = {} if name == "files" else {"keep": ["label"], "id_column": "key"}
        plan = stored_plan(str(photos / name), tmp_path / name, **options)
        settings = {"image_column": "image", "id_column": None, "keep": [], "rows_per_file": 3} | options
        again = plan_of_record(
            parse_uri(str(tmp_path / name)), json.loads(json.dumps({"plan": plan.to_json()})) | settings
        )
        assert [again.shard(n) for n in range(again.shards)] == [plan.shard(n) for n in range(plan.shards)]
        assert (again.images, again.source.kept) == (plan.images, plan.source.kept)
        assert plan.ids(2) == (None if name == "t.parquet" else plan.ids(2))


def repetition(source: Path, out: Path, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        write_plan(parse_uri(str(out)), open_input(str(source), rows_per_file=2, **options), 2, None)
    return str(caught.value)


def test_write_plan_refuses_repeated_and_empty_ids(tmp_path: Path) -> None:
    """Repeated and empty ids are refused with their number and an example."""
    write_files(tmp_path / "files", "%FF.jpg", b"\xff.jpg", "a.jpg")
    out = tmp_path / "out"
    assert "1 of the file names" in (message := repetition(tmp_path / "files", out))
    assert "'%FF.jpg'" in message
    write_table(tmp_path / "t.parquet", 5, key=["a", "b", "b", "c", "c"], number=[1, 2, None, None, 3])
    assert "2 of column 'key'" in (message := repetition(tmp_path / "t.parquet", out, id_column="key"))
    assert "'b'" in message
    assert "2 empty ids" in repetition(tmp_path / "t.parquet", out, id_column="number")
    path = write_table(tmp_path / "tables" / "%FF.parquet")
    path.with_name("\udcff.parquet").write_bytes(path.read_bytes())
    assert "'%FF.parquet'" in refusal(tmp_path / "tables")


def test_write_plan_refuses_ids_repeated_across_files(tmp_path: Path) -> None:
    """Ids must be unique across files too."""
    write_table(tmp_path / "a.parquet", 2, key=["a", "b"])
    write_table(tmp_path / "b.parquet", 2, key=["c", "a"])
    assert "'a'" in repetition(tmp_path, tmp_path / "out", id_column="key")
