"""The token dataset, format 1: plain Parquet that any reader understands, and our own reader.

A dataset is a folder: `data/*.parquet` (tokens), `_rejects/*.parquet` (what could not be tokenized, with the reason),
`_manifest.json` (written last: the dataset is complete) and a `README.md` for people and for Hugging Face.

Shapes: B images of one batch, K iterations, T tokens of the whole batch.
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
    """What determines the tokens of a dataset; every file carries it under the key `alit`, as JSON."""

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
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes | None, where: str) -> Metadata:
        """Reads what `to_bytes` wrote.

        Raises:
            DatasetError: absent, of another format, or not readable.
        """
        if data is None:
            raise DatasetError(f"{where} carries no alit metadata; it is no file of a token dataset")
        try:
            fields = json.loads(data)
            if fields["format"] != FORMAT:
                raise DatasetError(f"{where} has format {fields['format']!r}; this version reads format {FORMAT}")
            return cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{where} carries alit metadata that cannot be read: {error}") from error

    @property
    def bits_per_token(self) -> float:
        """Information in one token, in bits: log2 of the codebook's size."""
        return float(np.log2(self.codebook_size))


def kept_name(name: str) -> str:
    """The column name under which an input column is carried through."""
    return f"input_{name}" if name in OWN_NAMES else name


def token_schema(metadata: Metadata, kept: Sequence[pa.Field] = ()) -> pa.Schema:
    """The schema of `data/*.parquet`, with the input's kept columns after ours."""
    return pa.schema([*FIELDS, *kept], metadata={METADATA_KEY: metadata.to_bytes()})


def reject_schema(metadata: Metadata, kept: Sequence[pa.Field] = ()) -> pa.Schema:
    """The schema of `_rejects/*.parquet`."""
    return pa.schema([*REJECT_FIELDS, *kept], metadata={METADATA_KEY: metadata.to_bytes()})


def pack(
    encoded: Encoded, ids: Sequence[str], sizes: np.ndarray, schema: pa.Schema, kept: Sequence[pa.Array] = ()
) -> pa.RecordBatch:
    """One batch of results as Arrow rows.

    Args:
        encoded: B images, with discrete tokens.
        ids: B unique strings.
        sizes: width and height of the sources, [B, 2].
        schema: from `token_schema`.
        kept: the kept columns' values, in the schema's order.
    """
    tokens = pa.array(encoded.tokens.numpy().astype(np.uint16))
    offsets = np.zeros(len(encoded) + 1, np.int32)
    np.cumsum(encoded.num_tokens.numpy(), out=offsets[1:])
    trace, tried = encoded.trace.numpy(), encoded.tried.numpy()
    trace_offsets = np.zeros(len(encoded) + 1, np.int32)
    np.cumsum(tried, out=trace_offsets[1:])
    was_tried = np.arange(trace.shape[1]) < tried[:, None]  # not isnan: a user's measure may give NaN
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
    """A token dataset on disk or on any pyarrow filesystem, opened for reading.

    Args:
        folder: the dataset's folder, or its path on `filesystem`.
        filesystem: where the folder lies; the local disk when None.

    Raises:
        DatasetError: not complete (no `_manifest.json`), or not a dataset at all.
    """

    def __init__(self, folder: str | Path, filesystem: pafs.FileSystem | None = None) -> None:
        self.filesystem = filesystem or pafs.LocalFileSystem()
        self.folder = str(folder).rstrip("/")
        try:
            with self.filesystem.open_input_stream(f"{self.folder}/{MANIFEST}") as file:
                self.manifest: dict[str, Any] = json.loads(file.read())
        except FileNotFoundError as error:
            raise DatasetError(
                f"{self.folder!r} has no {MANIFEST}: it is not a token dataset, or one that is not complete yet"
            ) from error
        except ValueError as error:
            raise DatasetError(f"{self.folder}/{MANIFEST} is not readable JSON: {error}") from error
        for name in ("metadata", "images"):
            if not isinstance(self.manifest, dict) or name not in self.manifest:
                raise DatasetError(f"{self.folder}/{MANIFEST} has no {name!r}; it is no manifest of a token dataset")
        self.metadata = Metadata.from_bytes(json.dumps(self.manifest["metadata"]).encode(), f"{self.folder!r}")

    def __len__(self) -> int:
        return int(self.manifest["images"])

    def _files(self, folder: str) -> list[str]:
        selector = pafs.FileSelector(f"{self.folder}/{folder}", allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        return sorted(
            f.path for f in found if f.is_file and f.extension == "parquet" and not f.base_name.startswith(".")
        )

    def table(self, columns: Sequence[str] | None = None, filter: ds.Expression | None = None) -> pa.Table:
        """Rows as one Arrow table, in the order in which they were written.

        Args:
            columns: all when None.
            filter: a pyarrow expression such as `pyarrow.dataset.field("num_tokens") <= 32`.
        """
        files = self._files(DATA)
        columns = None if columns is None else list(columns)
        if not files:
            empty = token_schema(self.metadata).empty_table()
            return empty if columns is None else empty.select(columns)
        return ds.dataset(files, filesystem=self.filesystem).to_table(columns=columns, filter=filter)

    def rejects(self) -> pa.Table:
        """What could not be tokenized: id, reason, message."""
        files = self._files(REJECTS)
        if not files:
            return reject_schema(self.metadata).empty_table()
        return ds.dataset(files, filesystem=self.filesystem).to_table()

    def batches(self, batch_size: int = 64, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Rows in batches, without holding the dataset in memory."""
        columns = None if columns is None else list(columns)
        for path in self._files(DATA):
            with self.filesystem.open_input_file(path) as file:
                yield from pq.ParquetFile(file).iter_batches(batch_size, columns=columns)

    def require(self, fingerprint: str) -> None:
        """Refuses weights other than those that made the dataset.

        Raises:
            DatasetError: another fingerprint.
        """
        if fingerprint != self.metadata.fingerprint:
            raise DatasetError(
                f"{self.folder!r} was tokenized with the weights {self.metadata.fingerprint[:12]}…, "
                f"these are {fingerprint[:12]}…; name the ones it was made with"
            )

    def decode(self, weights: Weights, rows: pa.RecordBatch | pa.Table) -> Float[Tensor, "B 3 H W"]:
        """Rows back to images, floats in [0, 1].

        Args:
            weights: those that made the tokens.
            rows: with a column `tokens`, of mixed lengths.

        Raises:
            DatasetError: the tokens were made with other weights.
        """
        self.require(weights.fingerprint)
        return weights.model.decode(token_rows(rows.column("tokens")))


def token_rows(column: pa.Array | pa.ChunkedArray) -> tuple[Tensor, ...]:
    """A `tokens` column as one tensor of ids per image (views of one copy)."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    lengths = np.diff(column.offsets.to_numpy())
    flat = torch.from_numpy(column.flatten().to_numpy().astype(np.int64))
    return flat.split(lengths.tolist())


Precision = Literal["float32", "bfloat16"]


def metadata_of(
    weights: Weights, criterion: str, *, precision: Precision = "float32", jpeg: JpegMode = "full"
) -> Metadata:
    """What determines the tokens that these weights give under a criterion.

    Raises:
        CriterionError: the criterion does not parse, or the model cannot follow it.
        AlitError: the weights have continuous latents, which have no ids.
    """
    config = weights.model.config
    if config.codebook_size is None:
        raise AlitError(
            f"{str(weights.folder)!r} has continuous latents, which have no ids to store; use quantized weights"
        )
    parsed = parse(criterion)
    parsed.check(config)
    return Metadata(
        fingerprint=weights.fingerprint,
        criterion=parsed.spec,
        image_size=config.image_size,
        codebook_size=config.codebook_size,
        latents_per_iteration=config.latents_per_iteration,
        iterations=config.iterations,
        preprocessing=PREPROCESSING | {"jpeg": jpeg_decoding(jpeg)},
        precision=precision,
        halting=_halting(config),
        software=f"alit {alit.__version__}",
    )


def _halting(config: AlitConfig) -> str:
    return config.halting if config.halting == "off" else f"{config.halting} at {config.halting_threshold}"
