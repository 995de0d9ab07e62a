"""The tokenize job on a real Ray while processes are killed, decoders crash and storage fails."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flaky_proxy import FlakyProxy
from rich.console import Console
from small_models import TINY
from soak import Run, attack, compare, finished

from alit.dataset import TokenDataset
from alit.errors import AlitError
from alit.images.encode import encode_image
from alit.tokenizer import Alit
from alit.weights import save_weights
from jobs.dataset.verify import verify
from jobs.sources import decode
from jobs.tokenization.job import tokenize
from jobs.tokenization.options import TokenizeOptions

COUNT = 300

ROWS = 10


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    save_weights(folder, Alit(TINY), provenance={})
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred small images, some of which are broken."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        (folder / f"{i:04}.png").write_bytes(encode_image(pixels) if i % 50 else b"no picture")
    return folder


def options(weights: str, **changes: Any) -> TokenizeOptions:
    settings: dict[str, Any] = {"criterion": "l1:0.2", "rows_per_file": ROWS, "batch_size": 8, "workers": 1}
    return TokenizeOptions(weights=weights, **settings | changes)


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def undisturbed(ray_session: str, photos: Path, weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    tokenize(str(photos), str(output), options(weights), quiet())
    return output


def test_tokenize_resumes_after_kills_with_the_same_files(
    ray_session: str, undisturbed: Path, photos: Path, weights: str, tmp_path: Path
) -> None:
    """A job that is killed and terminated again and again ends with the files of an undisturbed one."""
    output = tmp_path / "out"
    arguments = [
        "tokenize",
        str(photos),
        str(output),
        "--weights",
        weights,
        "--criterion",
        "l1:0.2",
        "--batch-size",
        "8",
    ]
    arguments += ["--rows-per-file", str(ROWS), "--workers", "2"]
    result = attack(
        Run(arguments, output, tmp_path / "log", RAY_ADDRESS=ray_session),
        COUNT // ROWS,
        ["actor", "rename", "terminate", "driver"],
    )
    compare(output, undisturbed, result)
    assert result.different == []
    assert 0 <= result.encoded_again <= 4 * 2 * ROWS
    assert finished(output) == COUNT // ROWS
    assert verify(str(output), quiet())
    assert not [name for name in os.listdir(output / "data") if name.startswith(".")]


@pytest.mark.parametrize("decode_workers", [0, 1])
def test_tokenize_rejects_an_image_that_crashes_its_decoder(
    ray_session: str, photos: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode_workers: int
) -> None:
    """An image that crashes its decoder's process is rejected, and all others are tokenized."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(1, 26):
        (folder / f"{i}.png").write_bytes((photos / f"{i:04}.png").read_bytes())
    (folder / "13.png").write_bytes(b"CRASH")
    decode_image = decode.decode_image

    def crashing(data: bytes, *rest: Any) -> Any:
        if data == b"CRASH":
            os.kill(os.getpid(), signal.SIGKILL)
        return decode_image(data, *rest)

    monkeypatch.setattr(decode, "decode_image", crashing)
    output = tmp_path / "out"
    summary = tokenize(
        str(folder), str(output), options(weights, rows_per_file=10, decode_workers=decode_workers), quiet()
    )
    assert (summary.totals.images, summary.totals.rejects) == (24, 1)
    (reject,) = TokenDataset(output).rejects().to_pylist()
    assert (reject["id"], reject["reason"]) == ("13.png", "decoder_crashed")
    assert verify(str(output), quiet())


def test_tokenize_stops_at_the_maximum_reject_rate(ray_session: str, weights: str, tmp_path: Path) -> None:
    """A job that rejects too many images stops, and resumes once a higher rate is allowed."""
    (tmp_path / "in").mkdir()
    for i in range(400):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(b"GIF8 is no JPEG" if i else b"")
    with pytest.raises(
        AlitError, match=r"images were rejected, more than --max-reject-rate 0\.5 allows; for example '0\.jpg'"
    ):
        tokenize(str(tmp_path / "in"), str(tmp_path / "out"), options(weights, rows_per_file=100), quiet())
    assert not (tmp_path / "out" / "_manifest.json").exists()
    again = options(weights, rows_per_file=100, max_reject_rate=1.0)
    summary = tokenize(str(tmp_path / "in"), str(tmp_path / "out"), again, quiet())
    assert summary.totals.rejects == 400
    assert summary.encoded < 400, "finished shards are kept"
    assert verify(str(tmp_path / "out"), quiet())


def test_tokenize_survives_a_flaky_and_a_read_only_bucket(
    bucket: Any, undisturbed: Path, photos: Path, weights: str, tmp_path: Path
) -> None:
    """A job over a failing network resumes after its bucket was read-only and ends with the same files."""
    query, folder, _ = bucket
    target = str(re.search(r"127\.0\.0\.1:\d+", query)[0])  # pyright: ignore[reportOptionalSubscript]
    shutil.copytree(photos, folder / "in")
    with FlakyProxy(target, rate=0.05, stall=5, seed=0) as proxy:
        through = f"endpoint=http://{proxy.address}&region=us-east-1&timeout=1"
        arguments = ["tokenize", f"s3://photos/in?{through}", f"s3://photos/out?{through}", "--weights", weights]
        arguments += ["--criterion", "l1:0.2", "--batch-size", "8", "--rows-per-file", str(ROWS), "--workers", "2"]
        run = Run(arguments, folder / "out", tmp_path / "log")
        run.start()
        run.wait_until(lambda: finished(folder / "out") >= 5)
        proxy.read_only = True
        assert run.process is not None
        assert run.process.wait(120) == 2
        proxy.read_only = False
        said = run.log.read_text()
        assert re.search(r"alit: .*cannot be written: permission denied", said), said[-2000:]
        assert "Traceback" not in said
        assert not (folder / "out" / "_manifest.json").exists()
        run.start()
        assert run.process.wait(300) == 0, run.log.read_text()[-3000:]
        assert min(proxy.faults[kind] for kind in ("unavailable", "cut", "stalled")) > 0, proxy.faults
    for name in ("data", "_rejects"):
        for file in sorted((undisturbed / name).iterdir()):
            assert (folder / "out" / name / file.name).read_bytes() == file.read_bytes(), file.name
    assert verify(f"s3://photos/out?{query}", quiet())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 128 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_tokenize_resumes_after_a_full_disk(undisturbed: Path, photos: Path, weights: str, small_disk: Path) -> None:
    """A job on a full disk stops with one sentence and resumes when there is space."""
    output = small_disk / "out"
    with pytest.raises(AlitError, match=r"cannot be written: No space left on device"):
        tokenize(str(photos), str(output), options(weights), quiet())
    written = finished(output)
    assert 0 < written < COUNT // ROWS
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    summary = tokenize(str(photos), str(output), options(weights), quiet())
    assert summary.encoded == COUNT - ROWS * written
    for file in undisturbed.rglob("*.parquet"):
        assert (output / file.relative_to(undisturbed)).read_bytes() == file.read_bytes()
