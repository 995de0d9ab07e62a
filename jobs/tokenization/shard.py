"""One shard of a tokenization job: bytes to pixels to tokens to its two files, without Ray.

Neither a batch nor a pool of images crosses a shard boundary, so a shard's files depend on that shard alone.
"""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from alit.dataset import DATA, REJECTS, Precision, pack, reject_schema, token_schema
from alit.encoding.criteria import parse
from alit.encoding.results import Encoded
from alit.tokenizer import Alit
from jobs.dataset.counts import Counts, file_name
from jobs.sources.decode import DECODE_THREADS, Decoded, decode_rows
from jobs.sources.prefetch import prefetch
from jobs.sources.read import read_batches
from jobs.sources.records import Rows, Shard
from jobs.tokenization.description import TokenizeJob

REPORT_INTERVAL = 2.0
"""Seconds between two progress reports about one shard; each costs Ray Data some 20 ms."""

BATCHES_AHEAD = 3
"""Batches that are read and decoded before they are needed."""


def encoded_batches(
    model: Alit,
    batches: Iterator[Decoded],
    criterion: str,
    precision: Precision,
    batch_size: int,
    pool: bool | None = None,
) -> Iterator[tuple[Decoded, Encoded]]:
    """Encodes batches of pixels; the next batch is copied to the model's device while it works on the last one.

    Args:
        model: The model.
        batches: Batches in order.
        criterion: When an image has enough tokens.
        precision: Precision of the encoding.
        batch_size: Images per forward pass.
        pool: Encode unfinished images of several batches together. That keeps a GPU busy, but costs 7 % on a CPU, whose
            caches favor small batches. By default as suits the model's device.
    """
    device = model.encoder.positions.device
    parsed = parse(criterion)
    waiting: deque[Decoded] = deque()

    def images() -> Iterator[torch.Tensor]:
        for decoded in batches:
            waiting.append(decoded)
            pixels = decoded.pixels if decoded.pixels.flags.writeable else decoded.pixels.copy()
            tensor = torch.from_numpy(pixels)
            if device.type == "cuda":
                tensor = tensor.pin_memory().to(device, non_blocking=True)
            yield tensor.permute(0, 3, 1, 2)

    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        if device.type != "cpu" if pool is None else pool:
            results = model.encode_batches(images(), parsed, batch_size)
        else:
            results = (model.encode(batch, parsed) for batch in images())
        for encoded in results:
            yield waiting.popleft(), encoded


class ShardFiles:
    """Collects a shard's results and writes its two files; the token file comes last and marks the shard as done."""

    def __init__(self, job: TokenizeJob) -> None:
        self.output, metadata = job.output, job.metadata
        self.tokens_schema = token_schema(metadata, job.source.kept)
        self.rejects_schema = reject_schema(metadata, job.source.kept)
        self.tokens: list[pa.RecordBatch] = []
        self.rejects: list[pa.RecordBatch] = []

    def add(self, decoded: Decoded, encoded: Encoded) -> None:
        """Adds one batch: tokens of the decoded images, reasons for the rejected ones."""
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
        """Writes both files; the token file carries the counts in its footer.

        Raises:
            OSError: Storage refuses a file.
        """
        for folder, batches, schema in (
            (REJECTS, self.rejects, self.rejects_schema),
            (DATA, self.tokens, self.tokens_schema.with_metadata(self.tokens_schema.metadata | counts.to_metadata())),
        ):
            buffer = io.BytesIO()
            table = pa.Table.from_batches([batch.replace_schema_metadata(schema.metadata) for batch in batches], schema)
            pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
            (self.output / folder / file_name(counts.shard)).write(buffer.getvalue())


def tokenize_shard(job: TokenizeJob, model: Alit, shard: Shard, batches: Iterator[Decoded]) -> Iterator[Counts]:
    """Encodes and writes one shard; yields its cumulative counts every few seconds and once when it is written."""
    started = last_report = time.monotonic()
    files, config = ShardFiles(job), job.config
    images, rejects, satisfied, example = 0, 0, 0, ""
    lengths = np.zeros(config.iterations, np.int64)
    for decoded, encoded in encoded_batches(model, batches, job.criterion, job.precision, job.batch_size):
        files.add(decoded, encoded)
        images, rejects = images + len(encoded), rejects + len(decoded.rejects)
        iterations = encoded.num_tokens.numpy() // config.latents_per_iteration
        lengths += np.bincount(iterations - 1, minlength=config.iterations)
        satisfied += int(encoded.satisfied.sum())
        if decoded.rejects and not example:
            example = f"{decoded.ids[int(np.argmin(decoded.good))]!r}: {decoded.rejects[0][1]}"
        now = time.monotonic()
        if now - last_report > REPORT_INTERVAL:
            last_report = now
            yield Counts(shard.number, images, rejects, lengths.tolist(), satisfied, now - started, False, example)
    counts = Counts(shard.number, images, rejects, lengths.tolist(), satisfied, 0.0, True, example)
    files.write(counts)
    yield counts._replace(seconds=time.monotonic() - started)


def decode_batch(job: TokenizeJob, rows: Rows, run: Callable[..., Any] = map) -> Decoded:
    """Decodes one batch with the job's image size, limits and JPEG mode; `run` maps over images, e.g. in a pool."""
    return decode_rows(rows, job.config.image_size, job.limits, run, job.jpeg)


def decoded_batches(job: TokenizeJob, shard: Shard, threads: int = DECODE_THREADS) -> Iterator[Decoded]:
    """Yields a shard's batches, read and decoded in threads ahead of their use."""
    with ThreadPoolExecutor(threads) as pool:
        batches = read_batches(job.source, shard, job.batch_size, job.limits.max_bytes, pool)
        yield from prefetch((decode_batch(job, rows, pool.map) for rows in batches), BATCHES_AHEAD)
