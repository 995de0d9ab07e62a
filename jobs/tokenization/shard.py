"""One shard of the main job: bytes to pixels to tokens to its two files, without Ray.

Neither a batch nor a pool of survivors crosses a shard, so that a shard's files depend on the shard alone.
"""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from alit.dataset import DATA, REJECTS, Metadata, pack, reject_schema, token_schema
from alit.encoding.criteria import parse
from alit.encoding.results import Encoded
from alit.errors import AlitError
from alit.images.decode import JpegMode
from alit.images.formats import Limits
from alit.images.tensors import to_tensor
from alit.tokenizer import Alit
from jobs.dataset.counts import Counts, file_name
from jobs.sources.decode import DECODE_THREADS, Decoded, decode_rows
from jobs.sources.read import read_batches
from jobs.sources.records import Rows, Shard, Source
from jobs.storage.path import StoragePath

TELL_EVERY = 2.0
"""Seconds between two of a worker's messages about one shard: each costs Ray Data some 20 ms."""


AHEAD = 3
"""Batches that are read and decoded before they are asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """All that a worker needs to know; picklable.

    Attributes:
        source: where the input lies and how it is read.
        output: the dataset's folder.
        metadata: what determines the tokens.
        batch_size: images per forward pass; batches never cross a shard.
        limits: what one image may cost.
        jpeg: how JPEGs are decoded; the metadata names it too.
        threads: torch threads per worker; the same in every run, since sums may round differently with others.
    """

    source: Source
    output: StoragePath
    metadata: Metadata
    batch_size: int = 64
    limits: Limits = field(default_factory=Limits)
    jpeg: JpegMode = "full"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise AlitError(f"--batch-size must be at least 1, got {self.batch_size}")


def encoded_batches(
    model: Alit, batches: Iterator[Decoded], metadata: Metadata, batch_size: int, pool: bool | None = None
) -> Iterator[tuple[Decoded, Encoded]]:
    """Batches of pixels with their tokens; only bytes cross to the model's device, while it works on the last batch.

    Args:
        pool: whether images of several batches that need more tokens are encoded together. That fills a GPU; on a CPU,
            where caches like small batches, it costs 7 %. By default as is best for the model's device.
    """
    device = model.encoder.positions.device
    criterion = parse(metadata.criterion)
    waiting: deque[Decoded] = deque()

    def images() -> Iterator[torch.Tensor]:
        for decoded in batches:
            waiting.append(decoded)
            pixels = decoded.pixels if decoded.pixels.flags.writeable else decoded.pixels.copy()
            tensor = to_tensor(pixels)
            if device.type == "cuda":
                tensor = tensor.pin_memory().to(device, non_blocking=True)
            yield tensor

    with torch.autocast(device.type, torch.bfloat16, enabled=metadata.precision == "bfloat16"):
        if device.type != "cpu" if pool is None else pool:
            found = model.encode_batches(images(), criterion, batch_size)
        else:
            found = (model.encode(batch, criterion) for batch in images())
        for encoded in found:
            yield waiting.popleft(), encoded


class ShardFiles:
    """Gathers a shard's results and writes its two files, the tokens last: they say that the shard is done."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokens_schema = token_schema(job.metadata, job.source.kept)
        self.rejects_schema = reject_schema(job.metadata, job.source.kept)
        self.tokens: list[pa.RecordBatch] = []
        self.rejects: list[pa.RecordBatch] = []

    def add(self, decoded: Decoded, encoded: Encoded) -> None:
        mask = pa.array(decoded.good)
        if len(encoded):
            ids = [name for name, good in zip(decoded.ids, decoded.good, strict=True) if good]
            kept = [column.filter(mask) for column in decoded.kept]
            self.tokens.append(pack(encoded, ids, decoded.sizes, self.tokens_schema, kept))
        if decoded.rejects:
            ids = [name for name, good in zip(decoded.ids, decoded.good, strict=True) if not good]
            kept = [column.filter(pa.array(~decoded.good)) for column in decoded.kept]
            reasons, messages = (pa.array(values, pa.string()) for values in zip(*decoded.rejects, strict=True))
            columns = [pa.array(ids, pa.string()), reasons, messages, *kept]
            self.rejects.append(pa.RecordBatch.from_arrays(columns, schema=self.rejects_schema))

    def write(self, counts: Counts) -> None:
        for folder, batches, schema in (
            (REJECTS, self.rejects, self.rejects_schema),
            (DATA, self.tokens, self.tokens_schema.with_metadata(self.tokens_schema.metadata | counts.to_metadata())),
        ):
            buffer = io.BytesIO()
            table = pa.Table.from_batches([batch.replace_schema_metadata(schema.metadata) for batch in batches], schema)
            pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
            (self.job.output / folder / file_name(counts.shard)).write(buffer.getvalue())


def tokenize_shard(job: Job, model: Alit, shard: Shard, batches: Iterator[Decoded]) -> Iterator[Counts]:
    """Encodes and writes one shard, telling how far it is."""
    started = told = time.monotonic()
    files, config = ShardFiles(job), model.config
    images, rejects, satisfied, trouble = 0, 0, 0, ""
    lengths = np.zeros(config.iterations, np.int64)
    for decoded, encoded in encoded_batches(model, batches, job.metadata, job.batch_size):
        files.add(decoded, encoded)
        images, rejects = images + len(encoded), rejects + len(decoded.rejects)
        rounds = encoded.num_tokens.numpy() // config.latents_per_iteration
        lengths += np.bincount(rounds - 1, minlength=config.iterations)
        satisfied += int(encoded.satisfied.sum())
        if decoded.rejects and not trouble:
            trouble = f"{decoded.ids[int(np.argmin(decoded.good))]!r}: {decoded.rejects[0][1]}"
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            yield Counts(shard.number, images, rejects, lengths.tolist(), satisfied, told - started, False, trouble)
    counts = Counts(shard.number, images, rejects, lengths.tolist(), satisfied, 0.0, True, trouble)
    files.write(counts)
    yield counts._replace(seconds=time.monotonic() - started)


def decode_job(job: Job, rows: Rows, run: Callable[..., Any] = map) -> Decoded:
    """Bytes to pixels as the job asks."""
    return decode_rows(rows, job.metadata.image_size, job.limits, run, job.jpeg)


def decoded_batches(job: Job, shard: Shard, threads: int = DECODE_THREADS) -> Iterator[Decoded]:
    """A shard's images, read and decoded ahead of their use in threads."""
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as ahead:
        parts = read_batches(job.source, shard, job.batch_size, job.limits.max_bytes, pool)

        def following() -> Decoded | None:
            rows = next(parts, None)
            return None if rows is None else decode_job(job, rows, pool.map)

        waiting = deque(ahead.submit(following) for _ in range(AHEAD))
        while (decoded := waiting.popleft().result()) is not None:
            waiting.append(ahead.submit(following))
            yield decoded
