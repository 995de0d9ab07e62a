"""Datasets, runs and evaluations of format 1, written by an earlier release, are read and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from paths import TESTS

from alit.dataset import TokenDataset
from jobs.cli import main

FIXTURE = TESTS / "fixtures" / "format1"
WRITTEN_IN = "/tmp/fixture"
OPTIONS = ["--criterion", "l1:0.56", "--rows-per-file", "5", "--batch-size", "4", "--workers", "1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy, in which the recorded absolute paths are those of the copy."""
    copy = tmp_path / "fixture"
    shutil.copytree(FIXTURE, copy)
    for record in copy.rglob("*.json"):
        record.write_text(record.read_text().replace(WRITTEN_IN, str(copy)))
    return copy


def tokens_of(dataset: Path) -> pa.Table:
    return TokenDataset(dataset).table().sort_by("id")


def rows_of(log: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    measured = ("images_per_second", "waiting", "mfu")
    return [{name: value for name, value in row.items() if name not in measured} for row in rows]


def verified(dataset: Path) -> bool:
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(dataset)])
    return stop.value.code == 0


def test_format1_dataset_is_read_and_verified(folder: Path) -> None:
    """A finished dataset of format 1 verifies, and its rows and rejects are read."""
    assert verified(folder / "finished")
    dataset = TokenDataset(folder / "finished")
    assert (len(dataset), dataset.metadata.format, dataset.metadata.criterion) == (12, 1, "l1:0.56")
    assert sorted(dataset.table(["num_tokens"]).column(0).to_pylist()) == [2] * 7 + [8] * 5
    assert dataset.rejects().column("id").to_pylist() == ["broken.jpg"]


def test_format1_job_is_resumed(folder: Path, ray_session: None) -> None:
    """An interrupted job of format 1 is resumed, keeps its finished files and ends with the same rows."""
    kept = folder / "unfinished" / "data" / "00000000.parquet"
    before = kept.stat().st_mtime_ns
    output = folder / "unfinished"
    main(["tokenize", str(folder / "images"), str(output), "--weights", str(folder / "weights"), *OPTIONS])
    assert kept.stat().st_mtime_ns == before
    assert verified(output)
    resumed, expected = tokens_of(output), tokens_of(folder / "finished")
    exact = ["id", "tokens", "num_tokens", "satisfied", "width", "height"]
    assert resumed.select(exact).equals(expected.select(exact))
    assert resumed.column("score").to_numpy() == pytest.approx(expected.column("score").to_numpy(), abs=1e-5)
    assert TokenDataset(output).metadata.format == 1


def test_format1_run_is_resumed(folder: Path) -> None:
    """A training run is resumed from a checkpoint of an earlier release, with the losses of an undisturbed run."""
    options = ["--init", folder / "weights", "--validation", folder / "images", "--validation-images", "4"]
    options += ["--steps", "6", "--batch-size", "4", "--checkpoint-every", "3", "--log-every", "1", "--warmup", "2"]
    options += ["--validate-every", "3", "--quantize-from", "1", "--quantize-over", "2", "--pixel-from", "0"]
    options += ["--no-ray", "--no-bf16", "--threads", "1"]
    main(["train", "distill", str(folder / "images"), str(folder / "run"), *map(str, options)])
    rows, expected = rows_of(folder / "run" / "log.jsonl"), rows_of(folder / "run-log.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert list(row) == list(wanted)
        assert row == {name: pytest.approx(value, rel=2e-3) for name, value in wanted.items()}
    assert (folder / "run" / "weights" / "model.safetensors").exists()


def test_format1_evaluation_is_repeated(folder: Path) -> None:
    """An evaluation has the fields and, within rounding, the numbers of an earlier release's."""
    report = folder / "again"
    main(["evaluate", str(folder / "images"), str(report), "--weights", str(folder / "weights"), "--no-ray"])
    assert_alike(
        json.loads(report.with_suffix(".json").read_text()), json.loads((folder / "evaluation.json").read_text())
    )


def assert_alike(value: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(value) == list(expected)
        for name in expected:
            assert_alike(value[name], expected[name])
    elif isinstance(expected, list):
        assert len(value) == len(expected)
        for one, other in zip(value, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-4)
    else:
        assert value == expected
