"""`alit tokenize --dry-run`: what the job would do, and how long it would take, from a sample of the first images."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from alit.tokenizer import Alit
from alit.weights import Weights
from jobs.dataset.plan import limited, require_countable
from jobs.runtime.process import keep_freed_memory
from jobs.runtime.progress import counting, format_duration
from jobs.runtime.resources import Workers, existing_resources, joins_cluster
from jobs.sources.read import read_batches
from jobs.sources.records import Input, Shard
from jobs.tokenization.description import TokenizeJob, resolve_job_workers
from jobs.tokenization.options import TokenizeOptions
from jobs.tokenization.shard import decode_batch, encoded_batches

SAMPLE = 128
"""Images that are encoded to measure the time per image."""

ROW_BYTES = 80
"""Approximate size of an output row besides its tokens."""

KINDS = {
    "files": "image files",
    "links": "links of a list",
    "table": "rows of tables, as links",
    "tar": "samples of tars",
}


class Listing(NamedTuple):
    """The whole input, listed."""

    first: Shard
    images: int
    """0 for tars, whose images are not counted."""
    shards: int


class Sample(NamedTuple):
    """What encoding the first images showed."""

    images: int
    rejects: int
    tokens: int
    """Tokens of the images that were not rejected."""
    seconds: float
    """Time that one worker took."""


def preview_job(
    opened: Input, options: TokenizeOptions, job: TokenizeJob, weights: Weights, output: str, console: Console
) -> None:
    """Lists the input, encodes a sample of it in this process, and prints what the job would do.

    Args:
        opened: The input.
        options: The options as given.
        job: The job's description, without its workers.
        weights: The loaded weights.
        output: The dataset's folder, as given.
        console: Where it is printed.

    Raises:
        AlitError: The input cannot be listed or read.
    """
    require_countable(opened.source, options.limit)
    listing = _list(opened, options.limit, console)
    job = replace(job, workers=resolve_job_workers(options, existing_resources(), listing.shards))
    with console.status(f"encoding up to {SAMPLE} images"):
        sample = _encode_sample(job, listing.first, options.limit, weights.model)
    table = Table.grid(padding=(0, 2))
    for name, text in _lines(opened, options, job, listing, sample, output).items():
        if text:
            table.add_row(f"[bold]{name}[/]", text)
    console.print(table)
    console.print("nothing was written: this was a dry run", highlight=False)


def _list(opened: Input, limit: int | None, console: Console) -> Listing:
    first = next(opened.shards)
    images = count = 0
    with counting(console, "listing", "images found") as report:
        shards = chain([first], opened.shards)
        for shard in shards if limit is None else limited(shards, limit):
            images, count = images + shard.rows, count + 1
            report(images)
    return Listing(first, images, count)


def _encode_sample(job: TokenizeJob, shard: Shard, limit: int | None, model: Alit) -> Sample:
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    size = min(SAMPLE, limit or SAMPLE)
    if shard.rows > size:
        (shard,) = limited(iter([shard]), size)
    model = model.cuda() if torch.cuda.is_available() else model
    images = rejects = tokens = 0
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        rows = read_batches(job.source, shard, job.batch_size, job.limits.max_bytes, pool)
        batches = (decode_batch(job, part, pool.map) for part in rows)
        for decoded, encoded in encoded_batches(model, batches, job.criterion, job.precision, job.batch_size):
            images, rejects = images + len(decoded.ids), rejects + len(decoded.rejects)
            tokens += int(encoded.num_tokens.sum())
            if images >= SAMPLE:
                break
    return Sample(images, rejects, tokens, time.monotonic() - started)


def describe_workers(workers: Workers) -> str:
    """Returns the number of workers and what each of them gets, in words."""
    share = "a CPU" if not workers.gpus else "a GPU" if workers.gpus == 1 else f"{workers.gpus:g} GPUs"
    site = "in this cluster" if joins_cluster() else "on this machine"
    return f"{workers.count}, with {share} each, {site}"


def _lines(
    opened: Input, options: TokenizeOptions, job: TokenizeJob, listing: Listing, sample: Sample, output: str
) -> dict[str, str]:
    source = job.source
    counted = source.kind != "tar"
    kind = KINDS[source.kind] if source.kind != "table" or source.links else "rows of tables"
    lines = {
        "input": kind + (f" in {opened.files} file(s)" if opened.files is not None else ""),
        "columns": ", ".join(opened.columns),
        "images": f"{listing.images:,}" if counted else "as many as the tars hold",
        "output": f"{output}: {listing.shards:,} shards of "
        + (f"{options.rows_per_file:,} images" if counted else "a tar"),
        "kept": ", ".join(f"{field.name} ({field.type})" for field in source.kept),
        "model": f"{options.weights or 'packaged weights'}, {job.config.image_size} px, batches of {job.batch_size}",
        "criterion": job.criterion,
        "workers": describe_workers(job.workers),
        "first images": f"{sample.images} sampled, {sample.rejects} of them rejected",
    }
    if encoded := sample.images - sample.rejects:
        worker_rate = sample.images / sample.seconds
        rate = worker_rate * job.workers.count
        tokens = sample.tokens / encoded
        lines["tokens"] = f"{tokens:.1f} per image"
        lines["speed"] = f"about {rate:.0f} images/s, at {worker_rate:.0f} per worker with cold file caches"
        if counted:
            size = listing.images * encoded / sample.images * (tokens * 2 + ROW_BYTES)
            time_needed = format_duration(listing.images / rate)
            lines["time"] = f"about {time_needed}; about {decimal(round(size))} to be written"
    return lines
