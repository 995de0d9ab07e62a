"""`alit tokenize --dry-run`: what it prints."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs.runtime.resources import Resources
from jobs.tokenization.job import preview
from jobs.tokenization.options import TokenizeOptions


@pytest.mark.parametrize(
    ("resources", "options", "expected"),
    [
        (Resources(cpus=8, gpus=2), {"gpus_per_worker": 0.5}, "4, with 0.5 GPUs each"),
        (Resources(cpus=8, gpus=2), {}, "2, with a GPU each"),
        (Resources(cpus=5), {}, "5, with a CPU each"),
        (Resources(cpus=50), {}, "6, with a CPU each"),  # as many as there are shards
    ],
)
def test_dry_run_prints_the_workers_and_writes_nothing(
    image_folder: Path,
    small_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    resources: Resources,
    options: dict[str, Any],
    expected: str,
) -> None:
    """The workers are those that the job would start with these resources."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("jobs.tokenization.dry_run.existing_resources", lambda: resources)
    console = Console(file=io.StringIO(), width=200)
    given = TokenizeOptions(weights=str(small_weights), criterion="l1:0.3", rows_per_file=2, **options)
    preview(str(image_folder), str(tmp_path / "out"), given, console)
    printed = console.file.getvalue()
    assert f"{expected}, on this machine" in printed
    assert "12 sampled" not in printed, "the sample is the first shard"
    assert "2 sampled, 0 of them rejected" in printed
    assert not (tmp_path / "out").exists()
