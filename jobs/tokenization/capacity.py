"""`alit estimate`: time, storage and cost of tokenizing a corpus, from rates measured by `alit benchmark tokenize`."""

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
from alit.validation import option, require, require_range
from jobs.runtime.progress import HOUR, format_duration

LIST_PAGE = 1000
"""Objects that one list request returns."""

READ_BYTES = 8 << 20
"""Bytes that one request reads of a large file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Measurements of a tokenization job.

    Attributes:
        images_per_second: Throughput of one worker.
        startup: Seconds before the first shard starts.
        tokens: Mean tokens per image.
        output_bytes: Mean bytes of output per image.
        worker: Hardware of one worker: `cpu`, or a GPU's name.
        images: Number of images in the measurement.
        criterion: Criterion of the measurement.
        weights: Fingerprint of the weights.
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
        """Writes the rates to a JSON file."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Rates:
        """Reads rates that `save` wrote.

        Raises:
            AlitError: The file cannot be read, or does not hold valid rates.
        """
        try:
            record = json.loads(path.read_text())
            rates = cls(**{field.name: record[field.name] for field in fields(cls)})
            if not (rates.images_per_second > 0 and rates.startup >= 0):
                raise ValueError(f"images_per_second is {rates.images_per_second}, startup {rates.startup}")
            return rates
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise AlitError(
                f"{str(path)!r} holds no rates ({error}); alit benchmark tokenize PHOTOS --rates {path} measures them"
            ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateOptions:
    """Size and storage of the corpus, number of workers, and prices.

    Attributes:
        images: Number of images in the corpus, such as 1e9.
        gpus: Number of GPUs, one worker per GPU.
        workers: Number of workers; for rates measured on CPUs, and where workers share GPUs.
        rows_per_file: Images per output file, as for tokenize.
        input: Storage layout of the corpus: files are fetched one by one, parquet and tar in large reads.
        image_bytes: Mean size of an image file in bytes.
        worker_hour: Price of one worker's share of a machine per hour.
        gib_month: Price of storage per GiB and month.
        puts_1000: Price of a thousand write or list requests.
        gets_1000: Price of a thousand read requests.
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
    """Estimated time, storage and cost of a tokenization job.

    Attributes:
        seconds: Wall time of the command.
        worker_hours: Total over all workers, start-up included.
        shards: Number of shards, with two files each.
        output_bytes: Size of the dataset.
        input_bytes: Bytes that are read.
        puts: Write or list requests.
        gets: Read requests.
        compute: Price of the workers.
        storage_month: Price of storing the dataset for a month.
        requests: Price of the requests.
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


def estimate(rates: Rates, options: EstimateOptions) -> Estimate:
    """Estimates a job whose workers take shards in turn, so that it ends with the last round of shards.

    Args:
        rates: What was measured of one worker.
        options: The corpus, the workers and the prices.

    Raises:
        AlitError: No number of workers is given, or a number is out of range.
    """
    workers = _workers(options)
    shards = math.ceil(options.images / options.rows_per_file)
    last_rows = options.images - (shards - 1) * options.rows_per_file
    rounds, extra = divmod(shards, workers)  # the busiest worker has one shard more if the last round is not full
    rows = (rounds + bool(extra)) * options.rows_per_file
    if extra == 1 or (workers == 1 and not extra):  # its last shard is the short one
        rows += last_rows - options.rows_per_file
    seconds = rates.startup + rows / rates.images_per_second
    input_bytes = options.images * options.image_bytes
    gets = 2 * shards + (options.images if options.input == "files" else input_bytes / READ_BYTES)
    puts = 2 * shards + (options.images / LIST_PAGE if options.input == "files" else 0)
    hours = workers * seconds / HOUR
    output_bytes = options.images * rates.output_bytes
    return Estimate(
        seconds=seconds,
        worker_hours=hours,
        shards=shards,
        output_bytes=output_bytes,
        input_bytes=input_bytes,
        puts=puts,
        gets=gets,
        compute=hours * options.worker_hour,
        storage_month=output_bytes / 2**30 * options.gib_month,
        requests=puts / 1000 * options.puts_1000 + gets / 1000 * options.gets_1000,
    )


def _workers(options: EstimateOptions) -> int:
    """Returns the number of workers, after checking all counts."""
    workers = options.workers or options.gpus
    if workers is None:
        raise AlitError("the number of workers is missing: pass --gpus 64 or --workers 64")
    for name, value in (("images", options.images), ("workers", workers), ("rows_per_file", options.rows_per_file)):
        require_range(option(name), value, 1)
        require(math.isfinite(value), f"{option(name)} must be finite, got {value}")
    return workers


def print_estimate(rates: Rates, options: EstimateOptions, console: Console) -> Estimate:
    """Prints an estimate and lists its assumptions.

    Args:
        rates: What was measured of one worker.
        options: The corpus, the workers and the prices.
        console: Where it is printed.

    Returns:
        The estimate.

    Raises:
        AlitError: No number of workers is given, or a number is out of range.
    """
    result = estimate(rates, options)
    kind = "core" if rates.worker == "cpu" else "GPU"
    lines = {
        "corpus": f"{options.images:,.0f} images, {decimal(round(result.input_bytes))} to read",
        "time": f"{format_duration(result.seconds)} on {_workers(options)} workers",
        f"{kind} hours": f"{result.worker_hours:,.2f}",
        "tokens": f"{options.images * rates.tokens:,.0f}, {rates.tokens:.1f} per image",
        "dataset": f"{decimal(round(result.output_bytes))} in {result.shards:,} shards",
        "requests": f"{result.puts:,.0f} write or list requests, {result.gets:,.0f} read requests",
        "cost": f"{result.compute:,.2f} for compute and {result.requests:,.2f} for requests; then "
        f"{result.storage_month:,.2f} per month for storage",
    }
    table = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        table.add_row(f"[bold]{name}[/]", text)
    console.print(table)
    assumptions = [
        f"a worker ({rates.worker}) encodes {rates.images_per_second:,.1f} images/s, as measured on {rates.images:,} "
        f"images under {rates.criterion} with the weights {rates.weights[:12]}",
        "the corpus resembles those images, and storage and decoding keep up with all workers",
        f"no work is repeated; start-up takes {rates.startup:.0f} s, not counting the time to provision nodes",
        f"prices: {options.worker_hour:g} a worker hour, {options.gib_month:g} per GiB and month, "
        f"{options.puts_1000:g} and {options.gets_1000:g} per thousand requests; no traffic between regions",
    ]
    console.print("assumptions:\n" + "\n".join(f"- {line}" for line in assumptions), highlight=False, soft_wrap=True)
    return result
