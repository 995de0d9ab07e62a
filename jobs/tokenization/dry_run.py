"""`alit tokenize --dry-run`: what would be done, and how long it would take, from a look at the first images."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from alit.dataset import Metadata
from alit.images.formats import Limits
from alit.weights import Weights
from jobs.dataset.plan import limited, require_countable
from jobs.runtime.process import keep_freed_memory, local_cpus
from jobs.runtime.progress import counting, duration
from jobs.sources.decode import decode_rows
from jobs.sources.read import read_batches
from jobs.sources.records import Input, Shard
from jobs.tokenization.options import TokenizeOptions
from jobs.tokenization.shard import encoded_batches

SAMPLE = 128
"""Images that are encoded to see how long one takes."""
KINDS = {
    "files": "image files",
    "links": "links of a list",
    "table": "rows of tables, as links",
    "tar": "samples of tars",
}


def describe_plan(
    found: Input,
    options: TokenizeOptions,
    loaded: Weights,
    metadata: Metadata,
    batch_size: int,
    output: str,
    console: Console,
) -> None:
    """Lists the input, encodes some of it here, and prints what the job would do.

    Raises:
        AlitError: the input cannot be listed or read.
    """
    source, shards = found.source, found.shards
    require_countable(source, options.limit)
    first = next(shards)
    with counting(console, "listing", "images found") as tell:
        images = number = 0
        every = chain([first], shards)
        for shard in every if options.limit is None else limited(every, options.limit):
            images, number = images + shard.rows, number + 1
            tell(images)
    counted = source.kind != "tar"
    with console.status(f"encoding up to {SAMPLE} images"):
        seen, rejects, tokens, seconds = _sample(found, first, options, loaded, metadata, batch_size)
    workers = options.workers or (torch.cuda.device_count() or local_cpus())
    kind = KINDS[source.kind] if source.kind != "table" or source.links else "rows of tables"
    lines = {
        "input": kind + (f" in {found.files} file(s)" if found.files is not None else ""),
        "columns": ", ".join(found.columns),
        "images": f"{images:,}" if counted else "as many as the tars hold",
        "output": f"{output}: {number:,} shards of " + (f"{options.rows_per_file:,} images" if counted else "a tar"),
        "kept": ", ".join(f"{field.name} ({field.type})" for field in source.kept),
        "model": f"{options.weights or 'the packaged one'}, {metadata.image_size} px, batches of {batch_size}",
        "criterion": metadata.criterion,
        "workers": f"{workers} of {'a GPU' if torch.cuda.is_available() else 'a CPU'} each, where the job runs here",
        "first images": f"{seen} seen, {rejects} of them rejected",
    }
    if encoded := seen - rejects:
        rate = seen / seconds * workers
        lines["tokens"] = f"{tokens / encoded:.1f} per image"
        lines["speed"] = f"about {rate:.0f} images/s, from one worker's {seen / seconds:.0f}, files not yet in caches"
        if counted:
            size = images * encoded / seen * (tokens / encoded * 2 + 80)
            lines["time"] = f"about {duration(images / rate)}; about {decimal(round(size))} to be written"
    table = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        if text:
            table.add_row(f"[bold]{name}[/]", text)
    console.print(table)
    console.print("nothing was written: this was a dry run", highlight=False)


def _sample(
    found: Input, shard: Shard, options: TokenizeOptions, loaded: Weights, metadata: Metadata, batch_size: int
) -> tuple[int, int, int, float]:
    """Images seen and rejected, the tokens of the others, and the seconds that all of it took one worker."""
    torch.set_num_threads(1)
    keep_freed_memory()
    limits = Limits(max_bytes=options.max_bytes, max_pixels=options.max_pixels)
    if shard.rows > (most := min(SAMPLE, options.limit or SAMPLE)):
        (shard,) = limited(iter([shard]), most)
    model = loaded.model.cuda() if torch.cuda.is_available() else loaded.model
    rejects = tokens = seen = 0
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        rows = read_batches(found.source, shard, batch_size, limits.max_bytes, pool)
        batches = (decode_rows(part, metadata.image_size, limits, pool.map, options.jpeg) for part in rows)
        for decoded, encoded in encoded_batches(model, batches, metadata, batch_size):
            seen, rejects = seen + len(decoded.ids), rejects + len(decoded.rejects)
            tokens += int(encoded.num_tokens.sum())
            if seen >= SAMPLE:
                break
    return seen, rejects, tokens, time.monotonic() - started
