"""`alit plan`: what tokenizing a corpus would take, from rates that `alit benchmark tokenize --rates FILE` measured."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from alit.errors import AlitError
from jobs.runtime.progress import HOUR, duration

LISTED = 1000
"""Objects that one request lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What was measured of the job.

    Attributes:
        images_per_second: of one worker.
        startup: seconds before the first shard.
        tokens: per image.
        output_bytes: per image.
        worker: what one has: `cpu`, or a GPU's name.
        images: on which it was measured.
        criterion: under which.
        weights: their fingerprint.
    """

    images_per_second: float
    startup: float
    tokens: float
    output_bytes: float
    worker: str
    images: int
    criterion: str
    weights: str

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Rates:
        """Rates from a file of `save`.

        Raises:
            AlitError: it cannot be read, or holds something else.
        """
        try:
            found = json.loads(path.read_text())
            rates = cls(**{field.name: found[field.name] for field in fields(cls)})
            if not (rates.images_per_second > 0 and rates.startup >= 0):
                raise ValueError(f"images_per_second is {rates.images_per_second}, startup {rates.startup}")
            return rates
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise AlitError(
                f"{str(path)!r} holds no rates ({error}); alit benchmark tokenize PHOTOS --rates {path} measures them"
            ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """What is planned, and at what prices.

    Attributes:
        images: Of the corpus, such as 1e9.
        gpus: That work on it, one worker each; for rates of GPUs.
        workers: That work on it; for rates of CPUs, and where workers share GPUs.
        rows_per_file: As for tokenize.
        input: What the corpus lies in: files are fetched one by one, parquet and tar in large reads.
        image_bytes: Of an image file, on average: what has to be read.
        worker_hour: Price of one worker's share of a machine for an hour.
        gib_month: Price of a GiB of storage for a month.
        puts_1000: Price of a thousand requests that write or list.
        gets_1000: Price of a thousand requests that read.
    """

    images: float
    gpus: int | None = None
    workers: int | None = None
    rows_per_file: int = 1024
    input: Literal["files", "parquet", "tar"] = "parquet"
    image_bytes: float = 110_000
    worker_hour: float = 0.0
    gib_month: float = 0.023
    puts_1000: float = 0.005
    gets_1000: float = 0.0004


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What it would take.

    Attributes:
        seconds: from the command to its end.
        worker_hours: of all workers together, start-up included.
        shards: two files each.
        output_bytes: of the dataset.
        input_bytes: that are read.
        puts, gets: requests that write or list, and that read.
        compute, storage_month, requests: prices.
    """

    seconds: float
    worker_hours: float
    shards: int
    output_bytes: float
    input_bytes: float
    puts: float
    gets: float
    compute: float
    storage_month: float
    requests: float


READ = 8 << 20
"""Bytes of one request of a large file."""


def estimate(rates: Rates, options: PlanOptions) -> Estimate:
    """Workers take shards in turn, so the job ends when the last round of them does.

    Raises:
        AlitError: no number of workers, or an impossible one.
    """
    workers = options.workers or options.gpus
    if workers is None:
        raise AlitError("say how many work on it: --gpus 64, or --workers 64")
    for name, value in (("images", options.images), ("workers", workers), ("rows-per-file", options.rows_per_file)):
        if not 1 <= value < math.inf:
            raise AlitError(f"--{name} must be at least 1, got {value:g}")
    shards = math.ceil(options.images / options.rows_per_file)
    last = options.images - (shards - 1) * options.rows_per_file
    rounds, over = divmod(shards, workers)  # the first worker has the most: one more where the last round is not full
    rows = (rounds + bool(over)) * options.rows_per_file
    if over == 1 or (workers == 1 and not over):  # its last shard is the short one
        rows += last - options.rows_per_file
    seconds = rates.startup + rows / rates.images_per_second
    read = options.images * options.image_bytes
    gets = 2 * shards + (options.images if options.input == "files" else read / READ)
    puts = 2 * shards + (options.images / LISTED if options.input == "files" else 0)
    hours = workers * seconds / HOUR
    output = options.images * rates.output_bytes
    return Estimate(
        seconds=seconds,
        worker_hours=hours,
        shards=shards,
        output_bytes=output,
        input_bytes=read,
        puts=puts,
        gets=gets,
        compute=hours * options.worker_hour,
        storage_month=output / 2**30 * options.gib_month,
        requests=puts / 1000 * options.puts_1000 + gets / 1000 * options.gets_1000,
    )


def plan(rates: Rates, options: PlanOptions, console: Console) -> Estimate:
    """Prints an estimate, with what it assumes."""
    found = estimate(rates, options)
    workers = options.workers or options.gpus
    kind = "core" if rates.worker == "cpu" else "GPU"
    table = Table.grid(padding=(0, 2))
    cost = f"{found.compute:,.2f} compute and {found.requests:,.2f} requests; then {found.storage_month:,.2f} a month"
    lines = {
        "corpus": f"{options.images:,.0f} images, {decimal(round(found.input_bytes))} to read",
        "time": f"{duration(found.seconds)} on {workers} workers",
        f"{kind} hours": f"{found.worker_hours:,.2f}",
        "tokens": f"{options.images * rates.tokens:,.0f}, {rates.tokens:.1f} per image",
        "dataset": f"{decimal(round(found.output_bytes))} in {found.shards:,} shards",
        "requests": f"{found.puts:,.0f} that write or list, {found.gets:,.0f} that read",
        "cost": cost,
    }
    for name, text in lines.items():
        table.add_row(f"[bold]{name}[/]", text)
    console.print(table)
    assumed = [
        f"a worker ({rates.worker}) encodes {rates.images_per_second:,.1f} images/s, as measured on {rates.images:,} "
        f"images under {rates.criterion} with the weights {rates.weights[:12]}",
        "the corpus is like those images, and storage and decoding keep up with all workers",
        f"nothing is lost on the way; {rates.startup:.0f} s of start-up, nodes that have yet to come not counted",
        f"prices: {options.worker_hour:g} a worker's hour, {options.gib_month:g} a GiB and month, "
        f"{options.puts_1000:g} and {options.gets_1000:g} a thousand requests; no traffic between regions",
    ]
    console.print("assumed:\n" + "\n".join(f"- {line}" for line in assumed), highlight=False, soft_wrap=True)
    return found
