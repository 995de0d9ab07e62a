"""The token dataset, format 1: schemas, metadata and a reader.

A dataset is a folder of plain Parquet: `data/*.parquet` (tokens), `_rejects/*.parquet` (images that could not be
tokenized, with the reason), `_manifest.json` (written last, so that its presence means that the dataset is complete)
and a `README.md` in the form of a Hugging Face dataset card.

Shapes: B batch, K iterations, T tokens of the whole batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

import alit
from alit.encoding.criteria import parse
from alit.encoding.results import Encoded
from alit.errors import AlitError, DatasetError
from alit.images.decode import JpegMode, jpeg_decoding
from alit.model.config import AlitConfig
from alit.weights import PREPROCESSING, Weights

Precision = Literal["float32", "bfloat16"]

FORMAT = 1
METADATA_KEY = b"alit"
MANIFEST = "_manifest.json"
DATA = "data"
REJECTS = "_rejects"

FIELDS = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("tokens", pa.list_(pa.field("element", pa.uint16(), nullable=False)), nullable=False),
    pa.field("num_tokens", pa.uint16(), nullable=False),
    pa.field("score", pa.float32()),
    pa.field("satisfied", pa.bool_(), nullable=False),
    pa.field("trace", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
    pa.field("width", pa.uint32(), nullable=False),
    pa.field("height", pa.uint32(), nullable=False),
)

REJECT_FIELDS = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("reason", pa.string(), nullable=False),
    pa.field("message", pa.string(), nullable=False),
)

OWN_NAMES = frozenset(field.name for field in (*FIELDS, *REJECT_FIELDS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Metadata:
    """Everything that determines the tokens of a dataset; every file stores it as JSON under the key `alit`.

    Attributes:
        fingerprint: The fingerprint of the weights.
        criterion: The token-selection criterion.
        image_size: The side of the model's input, in pixels.
        codebook_size: The number of codes.
        latents_per_iteration: The number of tokens that each iteration adds.
        iterations: The maximum number of iterations.
        preprocessing: The conversion of image files to the model's input.
        precision: The precision of the encoding.
        halting: The halting mode, with its threshold.
        software: The name and version of the software that wrote the dataset.
        format: The version of the dataset format.
    """

    fingerprint: str
    criterion: str
    image_size: int
    codebook_size: int
    latents_per_iteration: int
    iterations: int
    preprocessing: dict[str, Any]
    precision: str
    halting: str
    software: str
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """Serializes the metadata as JSON."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes | None, source: str) -> Metadata:
        """Parses the output of `to_bytes`.

        Args:
            data: The JSON text; None if the file has no such key.
            source: The name of the file, for error messages.

        Raises:
            DatasetError: The metadata is missing, has another format, or cannot be read.
        """
        if data is None:
            raise DatasetError(f"{source} has no alit metadata; it is not a file of a token dataset")
        try:
            fields = json.loads(data)
            if fields["format"] != FORMAT:
                raise DatasetError(f"{source} has format {fields['format']!r}; this version reads format {FORMAT}")
            return cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{source} has alit metadata that cannot be read: {error}") from error

    @property
    def bits_per_token(self) -> float:
        """Bits per token: log2 of the codebook size."""
        return float(np.log2(self.codebook_size))


def kept_name(name: str) -> str:
    """Returns the dataset's name of an input column that is kept: prefixed with `input_` if the name is taken."""
    return f"input_{name}" if name in OWN_NAMES else name


def token_schema(metadata: Metadata, kept: Sequence[pa.Field] = ()) -> pa.Schema:
    """Returns the schema of `data/*.parquet`, with the kept input columns last."""
    return pa.schema([*FIELDS, *kept], metadata={METADATA_KEY: metadata.to_bytes()})


def reject_schema(metadata: Metadata, kept: Sequence[pa.Field] = ()) -> pa.Schema:
    """Returns the schema of `_rejects/*.parquet`, with the kept input columns last."""
    return pa.schema([*REJECT_FIELDS, *kept], metadata={METADATA_KEY: metadata.to_bytes()})


def pack(
    encoded: Encoded, ids: Sequence[str], sizes: np.ndarray, schema: pa.Schema, kept: Sequence[pa.Array] = ()
) -> pa.RecordBatch:
    """Converts a batch of results to Arrow rows.

    Args:
        encoded: B images, with discrete tokens.
        ids: B unique strings.
        sizes: The widths and heights of the source images, [B, 2].
        schema: The output of `token_schema`.
        kept: The values of the kept columns, in the schema's order.
    """
    tokens = pa.array(encoded.tokens.numpy().astype(np.uint16))
    offsets = np.pad(np.cumsum(encoded.num_tokens.numpy()), (1, 0)).astype(np.int32)
    trace, tried = encoded.trace.numpy(), encoded.tried.numpy()
    trace_offsets = np.pad(np.cumsum(tried), (1, 0)).astype(np.int32)
    was_tried = np.arange(trace.shape[1]) < tried[:, None]  # not isnan: a user's measure may return NaN
    columns = [
        pa.array(ids, pa.string()),
        pa.ListArray.from_arrays(pa.array(offsets), tokens, type=FIELDS[1].type),
        pa.array(encoded.num_tokens.numpy().astype(np.uint16)),
        pa.array(encoded.score.numpy(), mask=tried == 0),
        pa.array(encoded.satisfied.numpy()),
        pa.ListArray.from_arrays(pa.array(trace_offsets), pa.array(trace[was_tried]), type=FIELDS[5].type),
        pa.array(sizes[:, 0].astype(np.uint32)),
        pa.array(sizes[:, 1].astype(np.uint32)),
        *kept,
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


class TokenDataset:
    """Reader of a token dataset on any pyarrow filesystem; its length is the number of images.

    Args:
        folder: The dataset's folder, as a path on `filesystem`.
        filesystem: The filesystem; the local disk when None.

    Attributes:
        manifest: The content of `_manifest.json`.
        metadata: Everything that determines the tokens.

    Raises:
        DatasetError: The folder is not a token dataset, or not a complete one (it has no `_manifest.json`).
    """

    def __init__(self, folder: str | Path, filesystem: pafs.FileSystem | None = None) -> None:
        self.filesystem = filesystem or pafs.LocalFileSystem()
        self.folder = str(folder).rstrip("/")
        try:
            with self.filesystem.open_input_stream(f"{self.folder}/{MANIFEST}") as file:
                self.manifest: dict[str, Any] = json.loads(file.read())
        except FileNotFoundError as error:
            raise DatasetError(
                f"{self.folder!r} has no {MANIFEST}: not a token dataset, or not complete yet"
            ) from error
        except ValueError as error:
            raise DatasetError(f"{self.folder}/{MANIFEST} is not readable JSON: {error}") from error
        for name in ("metadata", "images"):
            if not isinstance(self.manifest, dict) or name not in self.manifest:
                raise DatasetError(
                    f"{self.folder}/{MANIFEST} has no {name!r}; it is not the manifest of a token dataset"
                )
        self.metadata = Metadata.from_bytes(json.dumps(self.manifest["metadata"]).encode(), f"{self.folder!r}")

    def __len__(self) -> int:
        return int(self.manifest["images"])

    def _files(self, folder: str) -> list[str]:
        selector = pafs.FileSelector(f"{self.folder}/{folder}", allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        parquet = [info for info in infos if info.is_file and info.extension == "parquet"]
        return sorted(info.path for info in parquet if not info.base_name.startswith("."))

    def table(self, columns: Sequence[str] | None = None, filter: ds.Expression | None = None) -> pa.Table:  # noqa: A002
        """Reads rows as one Arrow table, in the order in which they were written.

        Args:
            columns: The columns to read; all when None.
            filter: A pyarrow expression such as `pyarrow.dataset.field("num_tokens") <= 32`.
        """
        files = self._files(DATA)
        columns = None if columns is None else list(columns)
        if not files:
            empty = token_schema(self.metadata).empty_table()
            return empty if columns is None else empty.select(columns)
        return ds.dataset(files, filesystem=self.filesystem).to_table(columns=columns, filter=filter)

    def rejects(self) -> pa.Table:
        """Reads the images that could not be tokenized, as one table with the columns id, reason and message."""
        files = self._files(REJECTS)
        if not files:
            return reject_schema(self.metadata).empty_table()
        return ds.dataset(files, filesystem=self.filesystem).to_table()

    def batches(self, batch_size: int = 64, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Reads rows in batches, without holding the dataset in memory; all columns when `columns` is None."""
        columns = None if columns is None else list(columns)
        for path in self._files(DATA):
            with self.filesystem.open_input_file(path) as file:
                yield from pq.ParquetFile(file).iter_batches(batch_size, columns=columns)

    def require(self, fingerprint: str) -> None:
        """Checks that weights with this fingerprint made the dataset.

        Raises:
            DatasetError: Other weights made it.
        """
        if fingerprint != self.metadata.fingerprint:
            raise DatasetError(
                f"{self.folder!r} was tokenized with the weights {self.metadata.fingerprint[:12]}…, "
                f"these are {fingerprint[:12]}…; use the weights it was made with"
            )

    def decode(self, weights: Weights, rows: pa.RecordBatch | pa.Table) -> Float[Tensor, "B 3 H W"]:
        """Decodes rows to images, floats in [0, 1].

        Args:
            weights: The weights that made the tokens.
            rows: Rows with a column `tokens`, of mixed lengths.

        Raises:
            DatasetError: Other weights made the tokens.
        """
        self.require(weights.fingerprint)
        return weights.model.decode(token_rows(rows.column("tokens")))


def token_rows(column: pa.Array | pa.ChunkedArray) -> tuple[Tensor, ...]:
    """Converts a `tokens` column to one tensor of ids per image, views of one copy."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    lengths = np.diff(column.offsets.to_numpy())
    flat = torch.from_numpy(column.flatten().to_numpy().astype(np.int64))
    return flat.split(lengths.tolist())


def checked_criterion(weights: Weights, criterion: str) -> str:
    """Returns a criterion in its canonical spelling, after checking that these weights can tokenize under it.

    Raises:
        CriterionError: The criterion does not parse, or the model cannot follow it.
        AlitError: The weights have continuous latents, which have no ids.
    """
    config = weights.model.config
    if config.codebook_size is None:
        raise AlitError(
            f"{str(weights.folder)!r} has continuous latents, which have no ids to store; use quantized weights"
        )
    parsed = parse(criterion)
    parsed.check(config)
    return parsed.spec


def metadata_of(
    config: AlitConfig, fingerprint: str, criterion: str, *, precision: Precision = "float32", jpeg: JpegMode = "full"
) -> Metadata:
    """Returns the record of everything that determines the tokens of a dataset.

    Args:
        config: The model's configuration, with a codebook.
        fingerprint: Fingerprint of the weights.
        criterion: As `checked_criterion` returns it.
        precision: Precision of the encoding.
        jpeg: How JPEGs are decoded.
    """
    assert config.codebook_size is not None, "checked_criterion refuses continuous latents"
    return Metadata(
        fingerprint=fingerprint,
        criterion=criterion,
        image_size=config.image_size,
        codebook_size=config.codebook_size,
        latents_per_iteration=config.latents_per_iteration,
        iterations=config.iterations,
        preprocessing=PREPROCESSING | {"jpeg": jpeg_decoding(jpeg)},
        precision=precision,
        halting="off" if config.halting == "off" else f"{config.halting} at {config.halting_threshold}",
        software=f"alit {alit.__version__}",
    )
