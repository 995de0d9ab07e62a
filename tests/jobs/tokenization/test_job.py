"""The whole tokenize job on a real Ray: no image is lost, none is done twice, and mistakes are one sentence."""

import io
import json
import os
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from small_models import SMALL, random_model

from alit.dataset import METADATA_KEY, Metadata, TokenDataset, reject_schema, token_schema
from alit.errors import AlitError
from alit.images.decode import decode_image
from alit.weights import Weights, load_weights, save_weights
from jobs.storage.retry import StorageError
from jobs.tokenization import job
from jobs.tokenization.job import TokenizeSummary
from jobs.tokenization.options import TokenizeOptions

GOOD = 40
BAD = {  # file -> why it is rejected
    "empty.jpg": "empty",
    "text.jpg": "not_an_image",
    "cut.jpg": "truncated",
    "huge.png": "too_many_pixels",
    "pipe.jpg": "unreadable",
    "broken link.jpg": "unreadable",
}
STRANGE = {  # file -> id
    b"one pixel.png": "one pixel.png",
    b"caf\xe9.gif": "caf%E9.gif",
    "日本\n16 bit.png".encode(): "日本\n16 bit.png",
}
ROWS_PER_FILE = 16


def _bytes(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photo(seed: int) -> Image.Image:
    """Returns an image of blobs, which are harder the smaller they are."""
    random = np.random.default_rng(seed)
    blobs = random.integers(0, 256, (2 + seed % 5, 3, 3), np.uint8)
    return Image.fromarray(blobs).resize((40 + seed, 36), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty good images, some strange ones and some bad ones."""
    root = tmp_path_factory.mktemp("photos")
    for seed in range(GOOD):
        path = root / f"{seed % 3}" / f"{seed}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_bytes(photo(seed), "jpeg"))
    deep = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    frames = [photo(1).convert("P"), photo(1).rotate(90).convert("P")]
    strange = (
        _bytes(Image.new("RGB", (1, 1), "red"), "png"),
        _bytes(frames[0], "gif", save_all=True, append_images=frames[1:]),
        _bytes(Image.fromarray(deep), "png"),
    )
    for name, data in zip(STRANGE, strange, strict=True):
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(data)
    png = bytearray(_bytes(photo(0), "png"))
    png[16:24] = (1 << 20).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    for name, data in (("empty.jpg", b""), ("text.jpg", b"hello"), ("huge.png", bytes(png))):
        (root / name).write_bytes(data)
    (root / "cut.jpg").write_bytes(_bytes(photo(3), "jpeg")[:400])
    os.mkfifo(root / "pipe.jpg")
    (root / "broken link.jpg").symlink_to("nowhere")
    (root / "notes.txt").write_text("not input")
    return root


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same photographs as Parquet, with columns to keep and one null cell."""
    images: list[dict[str, object] | None] = [{"bytes": _bytes(photo(n), "jpeg"), "path": None} for n in range(12)]
    images[5] = None
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {
        "photo": pa.array(images, kind),
        "key": [f"image {n}" for n in range(12)],
        "boxes": pa.array([[{"x": n}] * (n % 3) for n in range(12)], pa.list_(pa.struct({"x": pa.int16()}))),
        "width": pa.array(range(12), pa.int8()),
    }
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=5)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Weights of a model for 32 px with 4 to 12 tokens."""
    path = tmp_path_factory.mktemp("weights") / "small"
    save_weights(path, random_model(SMALL), provenance={})
    return load_weights(path)


@pytest.fixture(scope="module")
def criterion(weights: Weights) -> str:
    """Returns a criterion that gives these images different lengths."""
    images = torch.stack([torch.from_numpy(decode_image(_bytes(photo(n), "png"), 32).pixels) for n in range(GOOD)])
    trace = weights.model.encode(images.permute(0, 3, 1, 2), "l1:0").trace
    return f"l1:{trace[:, 1].median().item():.6f}"


def tokenize(source: Path, output: Path, weights: Weights, **options: object) -> TokenizeSummary:
    defaults = {"rows_per_file": ROWS_PER_FILE, "batch_size": 5, "workers": 1}
    console = Console(file=io.StringIO())
    return job.tokenize(
        str(source), str(output), TokenizeOptions(weights=str(weights.folder), **defaults | options), console
    )


@dataclass
class Run:
    output: Path
    summary: TokenizeSummary


@pytest.fixture(scope="module")
def done(
    ray_session: None, folder: Path, weights: Weights, criterion: str, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """The dataset that most tests read."""
    output = tmp_path_factory.mktemp("tokens") / "out"
    return Run(output, tokenize(folder, output, weights, criterion=criterion))


@pytest.fixture
def copy(done: Run, tmp_path: Path) -> Path:
    """A copy of the dataset to damage, whose files keep their times."""
    subprocess.run(["cp", "-a", done.output, tmp_path / "copy"], check=True)
    return tmp_path / "copy"


def times(output: Path) -> dict[str, int]:
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in output.rglob("*.parquet")}


# -------------------------------------------------------------------- the dataset


def test_tokenize_accounts_for_every_image_once(done: Run) -> None:
    """Every image is either in the tokens or in the rejects, exactly once."""
    dataset = TokenDataset(done.output)
    ids = dataset.table(["id"])["id"].to_pylist()
    assert sorted(ids) == sorted([*(f"{n % 3}/{n}.jpg" for n in range(GOOD)), *STRANGE.values()])
    rejects = dataset.rejects().to_pylist()
    assert {row["id"]: row["reason"] for row in rejects} == BAD
    assert len(rejects) == len(BAD)
    assert all(row["message"] for row in rejects)


def test_tokenize_writes_the_models_tokens(done: Run, folder: Path, weights: Weights, criterion: str) -> None:
    """Tokens, scores, traces and sizes in the dataset equal those of the model itself."""
    rows = {row["id"]: row for row in TokenDataset(done.output).table().to_pylist()}
    names = [f"{n % 3}/{n}.jpg" for n in range(GOOD)]
    images = [decode_image((folder / name).read_bytes(), 32) for name in names]
    pixels = torch.from_numpy(np.stack([image.pixels for image in images])).permute(0, 3, 1, 2)
    direct = weights.model.encode(pixels, criterion)
    assert len(set(direct.num_tokens.tolist())) > 1, "the criterion of this test should spread the lengths"
    for i, (name, tokens) in enumerate(zip(names, direct.split(), strict=True)):
        row = rows[name]
        assert row["tokens"] == tokens.tolist()
        assert row["num_tokens"] == len(tokens)
        assert row["score"] == pytest.approx(direct.score[i].item(), abs=1e-5)
        assert row["trace"] == pytest.approx(direct.trace[i, : direct.tried[i]].tolist(), abs=1e-5)
        assert row["satisfied"] == direct.satisfied[i].item()
        assert (row["width"], row["height"]) == (images[i].width, images[i].height) == (40 + i, 36)


def test_tokenize_writes_plain_parquet(done: Run) -> None:
    """The files are plain Parquet that pyarrow and pandas read."""
    files = sorted((done.output / "data").glob("*.parquet"))
    assert len(files) == 4
    read = ds.dataset(files).to_table()
    assert read.schema.field("tokens").type == pa.list_(pa.field("element", pa.uint16(), nullable=False))
    frame = pd.concat([pd.read_parquet(file) for file in files])
    assert frame["tokens"].map(len).tolist() == frame["num_tokens"].tolist() == read["num_tokens"].to_pylist()
    assert frame["id"].is_unique


def test_tokenize_puts_metadata_in_every_file(done: Run, weights: Weights, criterion: str) -> None:
    """Every file carries the schema and the metadata that determine the tokens."""
    metadata = TokenDataset(done.output).metadata
    assert (metadata.fingerprint, metadata.criterion, metadata.image_size) == (weights.fingerprint, criterion, 32)
    for name, schema in (("data", token_schema(metadata)), ("_rejects", reject_schema(metadata))):
        for file in (done.output / name).iterdir():
            found = pq.read_schema(file)
            assert found.equals(schema)
            assert found.metadata is not None
            assert Metadata.from_bytes(found.metadata[METADATA_KEY], file.name) == metadata


def test_tokenize_writes_the_manifest_last(done: Run) -> None:
    """The manifest is written last and counts images, rejects, tokens and lengths."""
    manifest = json.loads((done.output / "_manifest.json").read_bytes())
    lengths = TokenDataset(done.output).table(["num_tokens", "satisfied"])
    numbers = lengths["num_tokens"].to_pylist()
    assert manifest["images"] == len(numbers) == GOOD + len(STRANGE) == done.summary.totals.images
    assert manifest["rejects"] == len(BAD)
    assert manifest["tokens"] == sum(numbers)
    assert manifest["lengths"] == {str(n): numbers.count(n) for n in (4, 8, 12)}
    assert manifest["satisfied"] == sum(lengths["satisfied"].to_pylist())
    assert manifest["files"] == 4
    newest = max((p for p in done.output.rglob("*") if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
    assert newest.name == "_manifest.json"
    assert (
        (done.output / "README.md").read_text().startswith("---\nconfigs:\n- config_name: default\n  data_files: data/")
    )


# -------------------------------------------------------------------- again


def test_tokenize_keeps_a_finished_dataset(done: Run, folder: Path, weights: Weights, criterion: str) -> None:
    """A finished dataset is neither computed again nor replaced without --overwrite."""
    before = times(done.output)
    with pytest.raises(AlitError, match=r"holds a finished dataset.*--overwrite"):
        tokenize(folder, done.output, weights, criterion=criterion)
    assert times(done.output) == before


def test_tokenize_overwrite_gives_the_same_files(
    done: Run, copy: Path, folder: Path, weights: Weights, criterion: str
) -> None:
    """With --overwrite, the dataset is replaced by files with the same bytes, and stale files are removed."""
    (copy / "data" / "stale.parquet").write_bytes(b"")
    before = times(copy)
    tokenize(folder, copy, weights, criterion=criterion, overwrite=True)
    assert not before.items() & times(copy).items()
    names = sorted(str(path.relative_to(done.output)) for path in done.output.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())
    for name in names:
        assert (copy / name).read_bytes() == (done.output / name).read_bytes(), name


def test_tokenize_resumes_with_missing_shards_only(
    done: Run, copy: Path, folder: Path, weights: Weights, criterion: str
) -> None:
    """A resumed job computes only the shards of which a file is missing."""
    before = times(copy)
    orphan = copy / "data" / f".00000002.parquet.{'0' * 32}.tmp"
    orphan.write_bytes(b"of a killed process")
    (copy / "_manifest.json").unlink()
    (copy / "data" / "00000001.parquet").unlink()
    (copy / "_rejects" / "00000003.parquet").unlink()
    summary = tokenize(folder, copy, weights, criterion=criterion)
    after = times(copy)
    redone = {f"{folder}/{shard:08d}.parquet" for folder in ("data", "_rejects") for shard in (1, 3)}
    assert {name for name in after if after[name] != before[name]} == redone
    assert summary.encoded == ROWS_PER_FILE + 1
    assert summary.totals == done.summary.totals
    assert (copy / "_manifest.json").read_bytes() == (done.output / "_manifest.json").read_bytes()
    assert TokenDataset(copy).table().equals(TokenDataset(done.output).table())
    assert not orphan.exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"criterion": "l1:0.5"}, "criterion"),
        ({"rows_per_file": 3}, "rows_per_file"),
        ({"batch_size": 3}, "batch_size"),
    ],
)
def test_tokenize_refuses_to_resume_with_other_settings(
    copy: Path, folder: Path, weights: Weights, criterion: str, options: dict[str, object], named: str
) -> None:
    """A job refuses to resume with other settings, names them and changes nothing."""
    (copy / "_manifest.json").unlink()
    before = times(copy)
    with pytest.raises(AlitError, match=rf"started with other settings \({named}: .*, now "):
        tokenize(folder, copy, weights, **{"criterion": criterion} | options)
    assert times(copy) == before


def test_tokenize_refuses_a_damaged_job_record(copy: Path, folder: Path, weights: Weights, criterion: str) -> None:
    """A damaged job record is refused."""
    (copy / "_manifest.json").unlink()
    (copy / "_job.json").write_bytes(b"{")
    with pytest.raises(AlitError, match=r"_job\.json' is damaged"):
        tokenize(folder, copy, weights, criterion=criterion)


# -------------------------------------------------------------------- tables


def test_tokenize_keeps_columns_of_a_table(ray_session: None, table: Path, tmp_path: Path, weights: Weights) -> None:
    """Kept columns of a table are in both tokens and rejects, with their types."""
    options = {"keep": ("boxes", "width"), "image_column": "photo", "id_column": "key", "decode_workers": 1}
    tokenize(table, tmp_path / "out", weights, criterion="fixed:8", rows_per_file=5, **options)
    dataset, source = TokenDataset(tmp_path / "out"), pq.read_table(table)
    found = dataset.table()
    assert found.schema.names[-2:] == ["boxes", "input_width"]
    assert found.schema.types[-2:] == [source.schema.field(name).type for name in ("boxes", "width")]
    assert found["id"].to_pylist() == [f"image {n}" for n in range(12) if n != 5]
    assert found["boxes"].to_pylist() == [[{"x": n}] * (n % 3) for n in range(12) if n != 5]
    assert found["score"].null_count == 11
    assert set(found["num_tokens"].to_pylist()) == {8}
    (reject,) = dataset.rejects().to_pylist()
    assert (reject["id"], reject["reason"], reject["input_width"]) == ("image 5", "unreadable", 5)


def test_tokenize_reports_errors_of_workers(
    ray_session: None, table: Path, tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in a worker reaches the caller as one sentence, and no manifest is written."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "_rejects").write_bytes(b"")  # a file in the place of a folder
    monkeypatch.setattr(job, "read_record", lambda output, overwrite: None)
    monkeypatch.setattr(job, "unwritten", lambda output, shards: np.arange(shards))
    with pytest.raises(AlitError, match=r"_rejects/00000000\.parquet' cannot be written: ") as caught:
        tokenize(table, output, weights, criterion="fixed:4", image_column="photo")
    assert "\n" not in str(caught.value)
    assert not (output / "_manifest.json").exists()


# -------------------------------------------------------------------- refusals, before Ray starts


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"workers": -1}, {"decode_workers": -1}, {"gpus_per_worker": -1.0}, {"batch_size": 0}]
)
def test_tokenize_refuses_numbers_out_of_range(
    folder: Path, tmp_path: Path, weights: Weights, options: dict[str, float]
) -> None:
    """Options out of range are refused before anything is written."""
    option = "--" + next(iter(options)).replace("_", "-")
    with pytest.raises(AlitError, match=f"{option} must be at least"):
        tokenize(folder, tmp_path / "out", weights, criterion="fixed:4", **options)
    assert not (tmp_path / "out").exists()


def test_tokenize_refuses_a_foreign_output(folder: Path, tmp_path: Path, weights: Weights) -> None:
    """An output that holds other files is refused and left as it is, with --overwrite too."""
    (tmp_path / "diary.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(AlitError, match=r"not empty|not a token dataset"):
            tokenize(folder, tmp_path, weights, criterion="fixed:4", overwrite=overwrite)
    with pytest.raises(StorageError, match="cannot be listed as a folder"):
        tokenize(folder, tmp_path / "diary.txt", weights, criterion="fixed:4")
    assert (tmp_path / "diary.txt").read_text() == "dear"


def test_tokenize_overwrite_never_removes_the_input(copy: Path, weights: Weights) -> None:
    """An input inside the output folder is refused and never removed."""
    inside = copy / "photos" / "a.jpg"
    inside.parent.mkdir()
    inside.write_bytes(_bytes(photo(0), "jpeg"))
    for source in (copy, inside, copy / "photos"):
        with pytest.raises(AlitError, match="the input lies in the output folder"):
            tokenize(source, copy, weights, criterion="fixed:4", overwrite=True)
    assert inside.exists()


def test_tokenize_refuses_an_output_inside_the_input(table: Path, tmp_path: Path, weights: Weights) -> None:
    """An output folder inside a folder of input tables is refused."""
    (tmp_path / "t.parquet").write_bytes(table.read_bytes())
    with pytest.raises(AlitError, match="lies in the input folder"):
        tokenize(tmp_path, tmp_path / "tokens", weights, criterion="fixed:4", image_column="photo")


def alit(*arguments: str | Path, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("alit")), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=timeout)


@pytest.fixture
def spoiled(weights: Weights, tmp_path: Path) -> dict[str, Path]:
    """Weights cut short, and weights of another architecture than their config's."""
    found = {}
    for name in ("cut", "misfit"):
        found[name] = tmp_path / name
        found[name].mkdir()
        for file in weights.folder.iterdir():
            (found[name] / file.name).write_bytes(file.read_bytes())
    model = found["cut"] / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    config = found["misfit"] / "config.json"
    config.write_text(config.read_text().replace('"depth": 1', '"depth": 2'))
    return found


def test_tokenize_command_reports_mistakes_in_one_line(
    done: Run, folder: Path, weights: Weights, spoiled: dict[str, Path], tmp_path: Path
) -> None:
    """The command reports bad input with one line and exit code 2, and writes nothing."""
    (tmp_path / "empty").mkdir()
    new = tmp_path / "new"
    cases = {
        "no images in": (tmp_path / "empty", new, "--weights", weights.folder),
        "holds a finished dataset": (folder, done.output, "--weights", weights.folder),
        "criterion 'l1' has no ':'": (folder, new, "--weights", weights.folder, "--criterion", "l1"),
        "not a complete safetensors file": (folder, new, "--weights", spoiled["cut"]),
        "does not fit its config": (folder, new, "--weights", spoiled["misfit"]),
    }
    running = {}
    for sentence, arguments in cases.items():  # all at once: most of the time is importing
        command = [str(Path(sys.executable).with_name("alit")), "tokenize", *map(str, arguments)]
        running[sentence] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for sentence, process in running.items():
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 2, stderr
        assert stdout == ""
        assert stderr.startswith("alit: ")
        assert sentence in stderr
        assert stderr.count("\n") == 1
    assert not new.exists()


def test_tokenize_ignores_packages_of_the_working_folder(weights: Weights, tmp_path: Path) -> None:
    """The command and its workers ignore packages named jobs and serve in the working folder."""
    for package in ("jobs", "serve"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('imported from the working folder')\n")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(_bytes(photo(0), "png"))
    finished = alit("tokenize", "photos/", "tokens", "--weights", weights.folder, "--workers", "1", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    assert TokenDataset(tmp_path / "tokens").table()["id"].to_pylist() == ["a.png"]
