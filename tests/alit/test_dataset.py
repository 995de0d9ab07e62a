"""The token dataset, format 1: plain Parquet that any reader understands, and our own reader of it."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALLEST

from alit.dataset import OWN_NAMES, Metadata, TokenDataset, kept_name, pack, reject_schema, token_rows, token_schema
from alit.encoding.results import Encoded
from alit.errors import DatasetError
from alit.tokenizer import Alit
from alit.weights import Weights

METADATA = Metadata(
    fingerprint="ab" * 32,
    criterion="l1:0.25",
    image_size=8,
    codebook_size=16,
    latents_per_iteration=2,
    iterations=4,
    preprocessing={"resize": "bicubic", "range": [0, 1]},
    precision="fp32",
    halting="off",
    software="alit 0.1.0",
)
NAN = float("nan")


@cache
def model() -> Alit:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Alit(SMALLEST).eval()


def weights(fingerprint: str = METADATA.fingerprint) -> Weights:
    return Weights(model=model(), fingerprint=fingerprint, provenance={}, folder=Path())


def made_up() -> Encoded:
    """Three images of 4, 8 and 2 tokens; the second never satisfied."""
    return Encoded(
        tokens=torch.arange(14) % 16,
        num_tokens=torch.tensor([4, 8, 2]),
        score=torch.tensor([0.25, 0.5, 0.125]),
        satisfied=torch.tensor([True, False, True]),
        trace=torch.tensor([[0.5, 0.25, NAN, NAN], [0.8, 0.7, 0.6, 0.5], [0.125, NAN, NAN, NAN]]),
        tried=torch.tensor([2, 4, 1]),
    )


def packed(encoded: Encoded, first: int = 0) -> pa.RecordBatch:
    ids = [f"folder/{first + i}.jpg" for i in range(len(encoded))]
    sizes = np.array([[640 + i, 480] for i in range(len(encoded))]).reshape(-1, 2)
    return pack(encoded, ids, sizes, token_schema(METADATA))


def through_parquet(folder: Path, rows: pa.RecordBatch) -> Path:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_batches([rows]), path, compression="zstd")
    return path


# ---------------------------------------------------------------- the schema


def test_token_schema_is_that_of_format_1():
    """The columns of a token file have the names and types of format 1."""
    found = {field.name: str(field.type) for field in token_schema(METADATA)}
    assert found == {
        "id": "string",
        "tokens": "list<element: uint16 not null>",
        "num_tokens": "uint16",
        "score": "float",
        "satisfied": "bool",
        "trace": "list<element: float not null>",
        "width": "uint32",
        "height": "uint32",
    }


def test_token_schema_allows_null_scores_only():
    """The score is the only column that may be null."""
    assert [field.name for field in token_schema(METADATA) if field.nullable] == ["score"]


def test_reject_schema_has_id_reason_and_message():
    """A reject has an id, a reason and a message, none of which may be null."""
    found = {field.name: (str(field.type), field.nullable) for field in reject_schema(METADATA)}
    assert found == {name: ("string", False) for name in ("id", "reason", "message")}


def test_schemas_append_kept_columns():
    """Columns that are kept from the input follow the columns of the format, with their types."""
    kept = [pa.field("label", pa.int16()), pa.field("tags", pa.list_(pa.string()))]
    for schema in (token_schema(METADATA, kept), reject_schema(METADATA, kept)):
        assert list(schema)[-2:] == kept


def test_files_hold_the_metadata_as_json(tmp_path):
    """Every file has the metadata as JSON under the key `alit`."""
    path = through_parquet(tmp_path, packed(made_up()))
    found = json.loads(pq.read_schema(path).metadata[b"alit"])
    assert found["format"] == 1
    assert {"fingerprint", "criterion", "image_size", "codebook_size", "latents_per_iteration"} <= found.keys()
    assert {"preprocessing", "precision", "halting", "software"} <= found.keys()


# ---------------------------------------------------------------- packing


def test_pack_survives_parquet(tmp_path):
    """Packed rows are read from Parquet with the same values and types."""
    table = pq.read_table(through_parquet(tmp_path, packed(made_up())))
    assert table.schema.equals(token_schema(METADATA), check_metadata=False)
    assert table.to_pydict() == {
        "id": ["folder/0.jpg", "folder/1.jpg", "folder/2.jpg"],
        "tokens": [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [12, 13]],
        "num_tokens": [4, 8, 2],
        "score": [0.25, 0.5, 0.125],
        "satisfied": [True, False, True],
        "trace": [
            [0.5, 0.25],
            [np.float32(0.8), np.float32(0.7), np.float32(0.6), 0.5],
            [0.125],
        ],
        "width": [640, 641, 642],
        "height": [480, 480, 480],
    }


def test_pandas_reads_tokens_without_this_library(tmp_path):
    """Pandas alone reads tokens, numbers of tokens and traces."""
    frame = pd.read_parquet(through_parquet(tmp_path, packed(made_up())))
    assert [list(row) for row in frame["tokens"]] == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [12, 13]]
    assert frame["num_tokens"].tolist() == frame["tokens"].map(len).tolist() == [4, 8, 2]
    assert frame["trace"].map(len).tolist() == [2, 4, 1]
    assert frame["tokens"][0].dtype == np.uint16


def test_pack_of_a_fixed_length_has_no_score_and_trace(tmp_path):
    """Images of a fixed length have a null score and an empty trace, and are satisfied."""
    encoded = model().encode(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "fixed:4")
    table = pq.read_table(through_parquet(tmp_path, packed(encoded)))
    assert table["score"].to_pylist() == [None, None]
    assert table["trace"].to_pylist() == [[], []]
    assert table["satisfied"].to_pylist() == [True, True]


def test_pack_keeps_scores_that_are_nan():
    """A score of NaN stays NaN instead of null, and its trace keeps its length."""
    encoded = made_up()
    encoded.trace[0, :2] = torch.tensor([NAN, NAN])
    encoded.score[0] = NAN
    rows = packed(encoded)
    assert rows["score"].null_count == 0
    assert np.isnan(rows["score"][0].as_py())
    assert len(rows["trace"][0]) == 2


def test_pack_of_no_images_has_no_rows():
    """A batch of no images packs to no rows."""
    encoded = model().encode(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "l1:0.2")
    assert packed(encoded).num_rows == 0


def test_pack_holds_the_largest_ids():
    """The ids of a codebook of 65,536 codes fit."""
    encoded = made_up()
    encoded.tokens[:] = 65535
    assert packed(encoded)["tokens"].to_pylist()[2] == [65535, 65535]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=6), st.data())
def test_token_rows_of_slices_and_chunks(rows, data):
    """`token_rows` returns the rows that were written, also of slices and of chunked columns."""
    column = pa.array(rows, pa.list_(pa.uint16()))
    start = data.draw(st.integers(0, len(rows)))
    assert [row.tolist() for row in token_rows(column.slice(start))] == rows[start:] or rows[start:] == []
    chunks = pa.chunked_array([column[:start], column[start:]], column.type)
    assert [row.tolist() for row in token_rows(chunks)] == rows or rows == []


# ---------------------------------------------------------------- metadata


TEXT = st.text(max_size=20)
JSON = st.dictionaries(TEXT, TEXT | st.integers() | st.booleans() | st.lists(st.integers(), max_size=3), max_size=3)


@settings(max_examples=50, deadline=None)
@given(
    st.fixed_dictionaries(
        {name: TEXT for name in ("fingerprint", "criterion", "precision", "halting", "software")}
        | {name: st.integers(1, 65536) for name in ("image_size", "codebook_size", "latents_per_iteration")}
        | {"iterations": st.integers(1, 256), "preprocessing": JSON}
    )
)
def test_metadata_survives_its_bytes(fields):
    """Any metadata is read from its bytes as it was, with format 1."""
    metadata = Metadata(**fields)
    assert Metadata.from_bytes(metadata.to_bytes(), "here") == metadata
    assert metadata.format == 1


def test_metadata_bits_per_token():
    """A token has as many bits as the logarithm of the codebook's size."""
    assert METADATA.bits_per_token == 4


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, "here.parquet has no alit metadata"),
        (json.dumps({"format": 2}).encode(), "here.parquet has format 2; this version reads format 1"),
        (json.dumps({"format": "1"}).encode(), "here.parquet has format '1'; this version reads format 1"),
        (b"{}", "here.parquet has alit metadata that cannot be read: 'format'"),
        (b"not json", "here.parquet has alit metadata that cannot be read"),
        (b"\xff\xfe", "here.parquet has alit metadata that cannot be read"),
        (b"[]", "here.parquet has alit metadata that cannot be read"),
        (json.dumps({"format": 1, "colour": "red"}).encode(), "cannot be read"),
        (json.dumps({"format": 1}).encode(), "cannot be read"),
    ],
)
def test_metadata_refuses_other_formats(data, expected):
    """Metadata that is missing, damaged or of another format is refused with the name of the file."""
    with pytest.raises(DatasetError, match=re.escape(expected)):
        Metadata.from_bytes(data, "here.parquet")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", sorted(OWN_NAMES))
def test_kept_name_prefixes_columns_that_collide(name):
    """A column of the input that has the name of a column of the format gets the prefix `input_`."""
    assert kept_name(name) == f"input_{name}"


@pytest.mark.parametrize("name", ["label", "ID", "input_id", "Width", "image", ""])
def test_kept_name_leaves_other_columns(name):
    """All other columns of the input keep their names."""
    assert kept_name(name) == name


def test_own_names_are_those_of_both_schemas():
    """`OWN_NAMES` has the columns of both schemas."""
    assert {*token_schema(METADATA).names, *reject_schema(METADATA).names} == OWN_NAMES


# ---------------------------------------------------------------- reading a dataset


def write_dataset(folder: Path, files: int = 2) -> Path:
    """A dataset made by hand: three images per file, and one reject."""
    (folder / "data").mkdir(parents=True)
    (folder / "_rejects").mkdir()
    for number in range(files):
        rows = pa.Table.from_batches([packed(made_up(), first=3 * number)])
        pq.write_table(rows, folder / "data" / f"part-{number:05}.parquet", compression="zstd")
    (folder / "data" / ".part-00000.parquet").write_bytes(b"half a file of a run that died")
    (folder / "data" / "notes.txt").write_text("not a token")
    reject = {"id": ["broken.jpg"], "reason": ["not_an_image"], "message": ["no image format is known"]}
    pq.write_table(pa.table(reject, schema=reject_schema(METADATA)), folder / "_rejects" / "part-00000.parquet")
    manifest = {"metadata": json.loads(METADATA.to_bytes()), "images": 3 * files}
    (folder / "_manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def dataset(tmp_path) -> TokenDataset:
    return TokenDataset(write_dataset(tmp_path / "tokens"))


def test_dataset_reads_metadata_and_length(dataset):
    """A dataset has its metadata and its number of images."""
    assert dataset.metadata == METADATA
    assert len(dataset) == 6


def test_table_has_the_rows_in_order(dataset):
    """`table` has all columns, and the rows in the order in which they were written."""
    table = dataset.table()
    assert table.schema.names == token_schema(METADATA).names
    assert table["id"].to_pylist() == [f"folder/{i}.jpg" for i in range(6)]


def test_table_selects_columns_and_rows(dataset):
    """`table` reads some columns only, and the rows that pass a filter."""
    table = dataset.table(["id", "num_tokens"], filter=ds.field("num_tokens") <= 4)
    assert table.to_pydict() == {"id": [f"folder/{i}.jpg" for i in (0, 2, 3, 5)], "num_tokens": [4, 2, 4, 2]}


def test_batches_have_the_rows_of_the_table(dataset):
    """`batches` yields the rows of `table`, at most as many at once as requested."""
    batches = list(dataset.batches(2, columns=["id", "tokens"]))
    assert max(batch.num_rows for batch in batches) == 2
    assert pa.Table.from_batches(batches).to_pydict() == dataset.table(["id", "tokens"]).to_pydict()


def test_rejects_are_read_separately(dataset):
    """`rejects` has the images that have no tokens."""
    assert dataset.rejects().to_pylist() == [
        {"id": "broken.jpg", "reason": "not_an_image", "message": "no image format is known"}
    ]


def test_decode_equals_that_of_the_model(dataset):
    """Rows of tables, slices and batches are decoded as the model decodes their ids."""
    table = dataset.table(["tokens"])
    expected = model().decode(table["tokens"].to_pylist())
    assert torch.equal(dataset.decode(weights(), table), expected)
    (batch,) = list(dataset.batches(2))[:1]
    torch.testing.assert_close(dataset.decode(weights(), batch), expected[:2])
    torch.testing.assert_close(dataset.decode(weights(), table.slice(4, 2)), expected[4:])


def test_dataset_refuses_other_weights(dataset):
    """Weights other than those that made the dataset are refused with both fingerprints."""
    dataset.require(METADATA.fingerprint)
    for attempt in (
        lambda: dataset.require("cd" * 32),
        lambda: dataset.decode(weights("cd" * 32), dataset.table()),
    ):
        with pytest.raises(
            DatasetError, match=r"was tokenized with the weights abababababab…, these are cdcdcdcdcdcd…"
        ):
            attempt()


def test_dataset_reads_any_filesystem(tmp_path):
    """A dataset is read through any filesystem of Arrow."""
    write_dataset(tmp_path / "tokens")
    elsewhere = TokenDataset("tokens", pa.fs.SubTreeFileSystem(str(tmp_path), pa.fs.LocalFileSystem()))
    assert elsewhere.table()["id"].to_pylist() == TokenDataset(tmp_path / "tokens").table()["id"].to_pylist()
    assert elsewhere.rejects().num_rows == 1


def test_dataset_of_no_images_has_all_columns(tmp_path):
    """A dataset without images has the same columns as any other one."""
    empty = TokenDataset(write_dataset(tmp_path / "tokens", files=0))
    assert len(empty) == 0
    assert empty.table().schema.equals(token_schema(METADATA), check_metadata=False)
    assert empty.table(["id", "tokens"]).to_pydict() == {"id": [], "tokens": []}
    assert list(empty.batches()) == []
    assert empty.decode(weights(), empty.table()).shape == (0, 3, 8, 8)


def test_dataset_without_rejects_has_an_empty_table(tmp_path):
    """A dataset without rejects has an empty table of them."""
    folder = write_dataset(tmp_path / "tokens")
    (folder / "_rejects" / "part-00000.parquet").unlink()
    (folder / "_rejects").rmdir()
    rejects = TokenDataset(folder).rejects()
    assert rejects.num_rows == 0
    assert rejects.schema.names == ["id", "reason", "message"]


@pytest.mark.parametrize("exists", [True, False])
def test_dataset_refuses_folders_without_manifest(tmp_path, exists):
    """A folder that is missing or has no manifest is refused as incomplete."""
    folder = tmp_path / "tokens"
    if exists:
        write_dataset(folder)
        (folder / "_manifest.json").unlink()
    with pytest.raises(DatasetError, match=r"tokens' has no _manifest\.json: .* not complete yet"):
        TokenDataset(folder)


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        ("{", "is not readable JSON"),
        ("[]", "has no 'metadata'"),
        ("{}", "has no 'metadata'"),
        ('{"metadata": {"format": 1}}', "has no 'images'"),
        ('{"images": 1, "metadata": {"format": 7}}', "has format 7; this version reads format 1"),
        ('{"images": 1, "metadata": null}', "cannot be read"),
    ],
)
@pytest.mark.unchecked
def test_dataset_refuses_damaged_manifests(tmp_path, manifest, expected):
    """A manifest that is no JSON, has no metadata or is of another format is refused with the cause."""
    folder = write_dataset(tmp_path / "tokens")
    (folder / "_manifest.json").write_text(manifest)
    with pytest.raises(DatasetError, match=expected):
        TokenDataset(folder)
