"""`alit verify` reports every kind of damage, and none in a sound dataset; without Ray."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from small_models import TINY, random_model
from tokenizing import tokenize_in_process

from alit.errors import AlitError
from alit.images.encode import encode_image
from alit.weights import load_weights, save_weights
from jobs.dataset.folder import JOB
from jobs.dataset.verify import verify
from jobs.storage.path import parse_uri
from jobs.tokenization.job import job_record
from jobs.tokenization.options import TokenizeOptions


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of a table with ids of its own, one image of which is bad."""
    folder = tmp_path_factory.mktemp("verify")
    save_weights(folder / "weights", random_model(TINY), provenance={})
    weights = load_weights(folder / "weights")
    pixels = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)
    images = [encode_image(image) for image in pixels]
    images[3] = b"no picture"
    pq.write_table(pa.table({"image": images, "key": [f"k{i}" for i in range(11)]}), folder / "t.parquet")
    for name, options in (("own", TokenizeOptions(id_column="key", keep=("key",))), ("plain", TokenizeOptions())):
        source, output = str(folder / "t.parquet"), str(folder / name)
        columns = {"keep": options.keep, "id_column": options.id_column}
        job, plan = tokenize_in_process(source, output, weights, "l1:0.25", rows_per_file=4, **columns)
        record = job_record(job, source, options, plan)
        (parse_uri(output) / JOB).write(json.dumps(record).encode())
    return folder


def said(folder: Path) -> tuple[bool, str]:
    text = io.StringIO()
    return verify(str(folder), Console(file=text, width=1000)), text.getvalue()


@pytest.mark.parametrize("name", ["own", "plain"])
def test_verify_accepts_a_sound_dataset(dataset: Path, name: str) -> None:
    """A dataset without damage is verified, with its numbers of shards, images and rejects."""
    sound, text = said(dataset / name)
    assert sound
    assert "3 shards, 10 images and 1 rejects: every planned image once, all files whole" in text


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)


def replaced(table: pa.Table, name: str, values: list) -> pa.Table:
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))


def one_more(values: list) -> list:
    return [values[0] + 1, *values[1:]]


DATA1 = "data/00000001.parquet"
DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing tokens", lambda d: (d / DATA1).unlink(), "data/00000001.parquet is missing"),
    ("missing rejects", lambda d: (d / "_rejects/00000002.parquet").unlink(), "_rejects/00000002.parquet is missing"),
    ("a flipped byte", lambda d: flip(d / DATA1), "data/00000001.parquet is damaged"),
    ("cut short", lambda d: (d / DATA1).write_bytes((d / DATA1).read_bytes()[:-9]), "is damaged"),
    ("a stray file", lambda d: shutil.copy(d / DATA1, d / "data" / "00000009.parquet"), "1 files that are not planned"),
    ("another shard's file", lambda d: shutil.copy(d / "data/00000000.parquet", d / DATA1), "images are not planned"),
    ("a row lost", lambda d: rewritten(d / DATA1, lambda t: t.slice(1)), "1 planned images are missing, such as"),
    ("a row doubled", lambda d: rewritten(d / DATA1, lambda t: pa.concat_tables([t, t.slice(0, 1)])), "more than once"),
    (
        "a wrong number of tokens",
        lambda d: rewritten(d / DATA1, lambda t: replaced(t, "num_tokens", one_more(t["num_tokens"].to_pylist()))),
        "num_tokens is not the number of tokens",
    ),
    (
        "an id that the codebook has not",
        lambda d: rewritten(
            d / DATA1, lambda t: replaced(t, "tokens", [[64, *row[1:]] for row in t["tokens"].to_pylist()])
        ),
        "token id 64 is out of range for a codebook of 64 codes",
    ),
    (
        "an odd length",
        lambda d: rewritten(d / DATA1, lambda t: replaced(t, "tokens", [row[1:] for row in t["tokens"].to_pylist()])),
        "which is not a length of the model",
    ),
    (
        "a trace cut short",
        lambda d: rewritten(d / DATA1, lambda t: replaced(t, "trace", [r[1:] for r in t["trace"].to_pylist()])),
        "a trace does not have",
    ),
    ("another schema", lambda d: rewritten(d / DATA1, lambda t: t.drop_columns("score")), "without score (float)"),
    (
        "other metadata",
        lambda d: pq.write_table(pq.read_table(d / DATA1).replace_schema_metadata({"alit": "{}"}), d / DATA1),
        "carries other metadata than the job",
    ),
    ("no manifest", lambda d: (d / "_manifest.json").unlink(), "it is not complete"),
    (
        "a manifest that counts wrong",
        lambda d: (d / "_manifest.json").write_text(
            (d / "_manifest.json").read_text().replace('"images": 10', '"images": 12')
        ),
        "_manifest.json says 12 images, the files hold 10",
    ),
]


@pytest.mark.parametrize(("damage", "expected"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_verify_reports_damage(dataset: Path, tmp_path: Path, damage: Callable[[Path], object], expected: str) -> None:
    """Every kind of damage makes the verification fail and is named."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset / "plain", copy)
    damage(copy)
    sound, text = said(copy)
    assert not sound
    assert expected in text


def test_verify_reports_ids_held_by_two_shards(dataset: Path, tmp_path: Path) -> None:
    """An id that two shards hold is reported where the plan does not list ids."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset / "own", copy)
    rewritten(copy / DATA1, lambda t: replaced(t, "id", ["k0", *t["id"].to_pylist()[1:]]))
    sound, text = said(copy)
    assert not sound
    assert "1 ids occur more than once" in text


def test_verify_refuses_what_is_no_dataset(dataset: Path, tmp_path: Path) -> None:
    """A folder without a job record, a plan or a readable record is refused with one sentence."""
    with pytest.raises(AlitError, match=r"has no _job\.json"):
        verify(str(tmp_path), Console(quiet=True))
    copy = tmp_path / "copy"
    shutil.copytree(dataset / "plain", copy)
    shutil.rmtree(copy / "_plan")
    with pytest.raises(AlitError, match="plan cannot be read"):
        verify(str(copy), Console(quiet=True))
    (copy / "_job.json").write_text("{")
    with pytest.raises(AlitError, match=r"_job\.json' is damaged"):
        verify(str(copy), Console(quiet=True))
