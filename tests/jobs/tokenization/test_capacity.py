"""`alit estimate`: the arithmetic of an estimate, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from alit.errors import AlitError
from jobs.tokenization.capacity import EstimateOptions, Rates, estimate, print_estimate

RATES = Rates(
    images_per_second=10.0,
    startup=20.0,
    tokens=40.0,
    output_bytes=100.0,
    worker="cpu",
    images=500,
    criterion="l1:0.08",
    weights="abc",
)


@pytest.mark.parametrize(
    ("images", "workers", "rows", "seconds"),
    [
        (1000, 1, 100, 100),  # ten shards, one after the other
        (1000, 2, 100, 50),
        (1000, 3, 100, 40),  # 4, 3 and 3 shards
        (1050, 1, 100, 105),  # the last one is half as long
        (1050, 2, 100, 55),  # the sixth of one of them is the short one
        (1050, 10, 100, 15),  # the eleventh, short, comes second on one of them
        (50, 8, 100, 10 - 5),  # one short shard
    ],
)
def test_estimate_lasts_as_long_as_the_busiest_worker(images: int, workers: int, rows: int, seconds: float) -> None:
    """The estimated duration is that of the worker with the most images."""
    found = estimate(RATES, EstimateOptions(images=images, workers=workers, rows_per_file=rows))
    assert found.seconds == pytest.approx(20 + seconds)
    assert found.worker_hours == pytest.approx(workers * found.seconds / 3600)


def test_estimate_counts_storage_requests_and_cost() -> None:
    """Output size, requests and cost follow from the number of images and the layout of the corpus."""
    asked = EstimateOptions(images=1e6, gpus=10, rows_per_file=1000, image_bytes=8 << 20, worker_hour=2, input="files")
    found = estimate(RATES, asked)
    assert found.shards == 1000
    assert found.output_bytes == 1e8
    assert found.puts == 2000 + 1000
    assert found.gets == 2000 + 1e6
    assert found.compute == pytest.approx(2 * 10 * (20 + 10000) / 3600)
    assert found.requests == pytest.approx(3 * asked.puts_1000 + 1002 * asked.gets_1000)
    tables = estimate(RATES, dataclasses.replace(asked, input="parquet"))
    assert (tables.puts, tables.gets) == (2000, 2000 + 1e6)


def test_print_estimate_lists_its_assumptions() -> None:
    """The estimate is printed together with every assumption."""
    console = Console(file=io.StringIO(), width=200)
    print_estimate(RATES, EstimateOptions(images=1e9, gpus=64), console)
    said = console.file.getvalue()
    for words in (
        "1,000,000,000 images",
        "64 workers",
        "as measured on 500 images under l1:0.08",
        "prices: 0 a worker",
    ):
        assert words in said


def test_rates_survive_their_file(tmp_path: Path) -> None:
    """Rates are read back from their file, and files that hold no rates are refused."""
    RATES.save(tmp_path / "rates.json")
    assert Rates.read(tmp_path / "rates.json") == RATES
    for text in ("{}", "[]", "nonsense", '{"images_per_second": 0}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(AlitError, match="holds no rates"):
            Rates.read(tmp_path / "bad.json")
    with pytest.raises(AlitError, match="holds no rates"):
        Rates.read(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"workers": None}, "--gpus 64"), ({"images": 0}, "--images must be at least 1"), ({"workers": 0}, "--workers")],
)
def test_estimate_refuses_impossible_plans(changes: dict, words: str) -> None:
    """Plans without workers or images are refused."""
    with pytest.raises(AlitError, match=words):
        estimate(RATES, EstimateOptions(**{"images": 10, "workers": 1} | changes))
