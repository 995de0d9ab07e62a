"""One shard of the main job: bytes to pixels to tokens to its two files; pure functions, and the Ray stages over them.

A batch never crosses a shard, so that a shard's files depend on the shard alone.
"""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import alit
from alit.config import AlitConfig
from alit.errors import AlitError
from alit.images import JPEG_DECODING, ImageError, Limits, decode_image
from alit.selection import Criterion, parse
from alit.tokenizer import Alit, Encoded
from alit.tokens import DATA, REJECTS, Metadata, pack, reject_schema, token_schema
from alit.weights import PREPROCESSING, Weights, load_weights
from jobs.inputs import Plan, Rows, Shard, Source, read_batches
from jobs.runner import keep_freed_memory
from jobs.storage import Place

DECODE_THREADS = 2
AHEAD = 3
"""Batches that are read and decoded before they are asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """All that a worker needs to know; picklable.

    Attributes:
        source: where the input lies and how it is read.
        output: the dataset's folder.
        metadata: what determines the tokens.
        weights: the weights folder.
        batch_size: images per forward pass; batches never cross a shard.
        limits: what one image may cost.
        threads: torch threads per worker; the same in every run, since sums may round differently with others.
    """

    source: Source
    output: Place
    metadata: Metadata
    weights: str
    batch_size: int = 64
    limits: Limits = field(default_factory=Limits)
    threads: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise AlitError(f"--batch-size must be at least 1, got {self.batch_size}")


class Decoded(NamedTuple):
    """A batch after decoding: pixels of the good images, reasons for the others."""

    ids: list[str]
    good: np.ndarray
    """Which of them were decoded, bool [B]."""
    pixels: np.ndarray
    """Of the good ones, uint8 [G, S, S, 3]."""
    sizes: np.ndarray
    """Width and height of the good ones' sources, [G, 2]."""
    rejects: list[tuple[str, str]]
    """Reason and message of the others, in order."""
    kept: list[pa.Array]


# -------------------------------------------------------------------- pure stages


def metadata_of(weights: Weights, criterion: str) -> Metadata:
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
        preprocessing=PREPROCESSING | {"jpeg": JPEG_DECODING},
        precision="float32",
        halting=_halting(config),
        software=f"alit {alit.__version__}",
    )


def _halting(config: AlitConfig) -> str:
    return config.halting if config.halting == "off" else f"{config.halting} at {config.halting_threshold}"


def decode_rows(rows: Rows, size: int, limits: Limits, run: Callable[..., Any] = map) -> Decoded:
    """Bytes to pixels, one image's failure being its own; `run` maps (a thread pool's, for speed)."""

    def decode(data: bytes | None, error: str | None) -> Any:
        if data is None:
            return "unreadable", error or "there are no bytes"
        try:
            return decode_image(data, size, limits)
        except ImageError as problem:
            return problem.reason, str(problem)

    results = list(run(decode, rows.data, rows.errors))
    good = np.array([hasattr(result, "pixels") for result in results], bool)
    images = [result for result in results if hasattr(result, "pixels")]
    pixels = np.stack([image.pixels for image in images]) if images else np.zeros((0, size, size, 3), np.uint8)
    sizes = np.array([(image.width, image.height) for image in images], np.uint32).reshape(-1, 2)
    rejects = [result for result in results if not hasattr(result, "pixels")]
    return Decoded(rows.ids, good, pixels, sizes, rejects, rows.kept)


def encode_pixels(model: Alit, pixels: np.ndarray, criterion: Criterion) -> Encoded:
    """Pixels [B, S, S, 3] to tokens; only bytes cross to the model's device."""
    images = torch.from_numpy(pixels).to(model.encoder.positions.device, non_blocking=True)
    return model.encode(images.permute(0, 3, 1, 2), criterion)


class ShardFiles:
    """Gathers a shard's results and writes its two files, the tokens last: they say that the shard is done."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokens_schema = token_schema(job.metadata, job.source.kept)
        self.rejects_schema = reject_schema(job.metadata, job.source.kept)
        self.tokens: list[pa.RecordBatch] = []
        self.rejects: list[pa.RecordBatch] = []

    def add(self, decoded: Decoded, encoded: Encoded | None) -> None:
        mask = pa.array(decoded.good)
        if encoded is not None:
            ids = [name for name, good in zip(decoded.ids, decoded.good, strict=True) if good]
            kept = [column.filter(mask) for column in decoded.kept]
            self.tokens.append(pack(encoded, ids, decoded.sizes, self.tokens_schema, kept))
        if decoded.rejects:
            ids = [name for name, good in zip(decoded.ids, decoded.good, strict=True) if not good]
            kept = [column.filter(pa.array(~decoded.good)) for column in decoded.kept]
            reasons, messages = (pa.array(values, pa.string()) for values in zip(*decoded.rejects, strict=True))
            columns = [pa.array(ids, pa.string()), reasons, messages, *kept]
            self.rejects.append(pa.RecordBatch.from_arrays(columns, schema=self.rejects_schema))

    def write(self, number: int) -> None:
        name = file_name(number)
        for folder, batches, schema in (
            (REJECTS, self.rejects, self.rejects_schema),
            (DATA, self.tokens, self.tokens_schema),
        ):
            buffer = io.BytesIO()
            pq.write_table(pa.Table.from_batches(batches, schema), buffer, compression="zstd")
            (self.job.output / folder / name).write(buffer.getvalue())


def file_name(number: int) -> str:
    """The name of shard `number`'s files."""
    return f"{number:08d}.parquet"


class Progress(NamedTuple):
    """What a worker tells the driver after each batch, and once more when a shard's files are written."""

    shard: int
    images: int
    rejects: int
    lengths: list[int]
    """How many images got each length."""
    satisfied: int
    seconds: float
    """Since the shard was started."""
    done: bool


def tokenize_shard(job: Job, model: Alit, shard: Shard, batches: Iterator[Decoded]) -> Iterator[Progress]:
    """Encodes and writes one shard, telling how far it is."""
    started = time.monotonic()
    criterion = parse(job.metadata.criterion)
    files, config = ShardFiles(job), model.config
    images, rejects, satisfied = 0, 0, 0
    lengths = np.zeros(config.iterations, np.int64)
    for decoded in batches:
        encoded = encode_pixels(model, decoded.pixels, criterion) if len(decoded.pixels) else None
        files.add(decoded, encoded)
        images, rejects = images + len(decoded.pixels), rejects + len(decoded.rejects)
        if encoded is not None:
            rounds = encoded.num_tokens.numpy() // config.latents_per_iteration
            lengths += np.bincount(rounds - 1, minlength=config.iterations)
            satisfied += int(encoded.satisfied.sum())
        yield Progress(shard.number, images, rejects, lengths.tolist(), satisfied, time.monotonic() - started, False)
    files.write(shard.number)
    yield Progress(shard.number, images, rejects, lengths.tolist(), satisfied, time.monotonic() - started, True)


def decoded_batches(job: Job, shard: Shard, threads: int = DECODE_THREADS) -> Iterator[Decoded]:
    """A shard's images, read and decoded ahead of their use in threads."""
    size = job.metadata.image_size
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as ahead:
        parts = read_batches(job.source, shard, job.batch_size, job.limits.max_bytes, pool)

        def following() -> Decoded | None:
            rows = next(parts, None)
            return None if rows is None else decode_rows(rows, size, job.limits, pool.map)

        waiting = deque(ahead.submit(following) for _ in range(AHEAD))
        while (decoded := waiting.popleft().result()) is not None:
            waiting.append(ahead.submit(following))
            yield decoded


def decoded_plan(plan: Plan, size: int, batch_size: int) -> Iterator[Decoded]:
    """A whole input's images in batches, for those who only look at the first ones."""
    limits = Limits()
    with ThreadPoolExecutor() as pool:
        for shard in plan.shards:
            for rows in read_batches(plan.source, shard, batch_size, limits.max_bytes, pool):
                yield decode_rows(rows, size, limits, pool.map)


# -------------------------------------------------------------------- Ray stages


def _progress_table(progress: Progress) -> pa.Table:
    return pa.table({name: [value] for name, value in zip(Progress._fields, progress, strict=True)})


class Tokenizer:
    """The actor: loads the model once, then turns one shard after the other into files."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        keep_freed_memory()
        self.job = job
        self.model = load_weights(job.weights).model
        if torch.cuda.is_available():
            self.model = self.model.cuda()

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        for index, shard in enumerate(_shards(rows)):
            if "decoded" in rows.column_names:
                batches = _unpack(rows.column("decoded")[index].as_buffer())
            else:
                batches = decoded_batches(self.job, shard)
            for progress in tokenize_shard(self.job, self.model, shard, batches):
                yield _progress_table(progress)


@dataclass(frozen=True, slots=True)
class DecodeStage:
    """The CPU stage before GPU actors: a shard's row gets its decoded images."""

    job: Job

    def __call__(self, rows: pa.Table) -> pa.Table:
        cells = [_pack(decoded_batches(self.job, shard)) for shard in _shards(rows)]
        return rows.append_column("decoded", pa.array(cells, pa.large_binary()))


SHARD_SCHEMA = pa.schema(
    {
        "number": pa.int64(),
        "ids": pa.list_(pa.string()),
        "paths": pa.list_(pa.binary()),
        "start": pa.int64(),
        "rows": pa.int64(),
    }
)


def _shards(rows: pa.Table) -> list[Shard]:
    parts = rows.select(SHARD_SCHEMA.names).to_pylist()
    return [Shard(**part | {"ids": tuple(part["ids"]), "paths": tuple(part["paths"])}) for part in parts]


def _pack(batches: Iterator[Decoded]) -> bytes:
    """Decoded batches as one Arrow IPC stream: one cell of one row, which Ray Data never splits."""
    sink = io.BytesIO()
    writer = None
    for decoded in batches:
        side = decoded.pixels.shape[1]
        pixels, sizes = (
            np.zeros((len(decoded.ids), side * side * 3), np.uint8),
            np.zeros((len(decoded.ids), 2), np.uint32),
        )
        pixels[decoded.good] = decoded.pixels.reshape(len(decoded.pixels), side * side * 3)
        sizes[decoded.good] = decoded.sizes
        reasons, messages = np.full((2, len(decoded.ids)), None, object)
        for row, (reason, message) in zip(np.flatnonzero(~decoded.good), decoded.rejects, strict=True):
            reasons[row], messages[row] = reason, message
        columns = {
            "id": pa.array(decoded.ids, pa.string()),
            "good": pa.array(decoded.good),
            "pixels": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(side * side * 3), len(decoded.ids), [None, pa.py_buffer(pixels)]
            ),
            "width": pa.array(sizes[:, 0]),
            "height": pa.array(sizes[:, 1]),
            "reason": pa.array(reasons, pa.string()),
            "message": pa.array(messages, pa.string()),
        } | {f"kept_{i}": column for i, column in enumerate(decoded.kept)}
        batch = pa.RecordBatch.from_pydict(columns)
        if writer is None:
            writer = pa.ipc.new_stream(sink, batch.schema)
        writer.write_batch(batch)
    if writer is not None:
        writer.close()
    return sink.getvalue()


def _unpack(cell: pa.Buffer) -> Iterator[Decoded]:
    for batch in pa.ipc.open_stream(cell):
        good = batch.column("good").to_numpy(zero_copy_only=False)
        column = batch.column("pixels")
        side = round((column.type.byte_width // 3) ** 0.5)
        flat = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, side, side, 3)
        pixels = flat[column.offset : column.offset + len(batch)][good]
        sizes = np.stack([batch.column("width").to_numpy(), batch.column("height").to_numpy()], 1)[good]
        bad = pa.array(~good)
        reasons, messages = (batch.column(name).filter(bad).to_pylist() for name in ("reason", "message"))
        kept = [batch.column(i) for i, name in enumerate(batch.schema.names) if name.startswith("kept_")]
        rejects = list(zip(reasons, messages, strict=True))
        yield Decoded(batch.column("id").to_pylist(), good, pixels, sizes, rejects, kept)
