"""Benchmark of the tokenization job against a bare loop, as a ratio within one run."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from alit.dataset import checked_criterion
from alit.encoding.criteria import parse
from alit.images.tensors import to_tensor
from alit.tokenizer import Alit
from jobs.benchmarks.options import TokenizeBenchmarkOptions
from jobs.runtime.process import keep_freed_memory, local_cpus
from jobs.runtime.weights import load
from jobs.sources.open import make_plan
from jobs.sources.records import Plan
from jobs.storage.path import parse_uri
from jobs.tokenization.capacity import Rates
from jobs.tokenization.description import TokenizeJob, describe_job
from jobs.tokenization.job import TokenizeSummary, tokenize
from jobs.tokenization.options import TokenizeOptions
from jobs.tokenization.shard import decoded_batches

BATCH_SIZES = (16, 32, 64, 128)
"""Batch sizes that are tried, of which the fastest is used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeRates:
    """Throughput of the bare loop and of the job.

    Attributes:
        bare: Images per second of the bare loop, one value per round.
        job: Images per second of the job, one value per round.
        startup: Seconds of the job's start-up, one value per round.
        batch_size: The batch size of both.
    """

    bare: list[float]
    job: list[float]
    startup: list[float]
    batch_size: int

    @property
    def ratio(self) -> float:
        """The job's rate over the bare loop's, the median of the rounds' ratios."""
        return statistics.median(job / bare for job, bare in zip(self.job, self.bare, strict=True))


def bare_loop(job: TokenizeJob, plan: Plan, model: Alit, threads: int) -> float:
    """Encodes an input in this process, without Ray and without output; threads decode ahead.

    Args:
        job: The criterion and the batch size.
        plan: The input.
        model: The tokenizer.
        threads: Number of torch threads, and of threads that decode.

    Returns:
        Images per second.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    criterion = parse(job.criterion)
    images, start = 0, time.perf_counter()
    for shard in plan.shards:
        for decoded in decoded_batches(job, shard, threads):
            model.encode(to_tensor(decoded.pixels), criterion)
            images += len(decoded.ids)
    return images / (time.perf_counter() - start)


def benchmark_tokenize(source: str, options: TokenizeBenchmarkOptions, console: Console) -> TokenizeRates:
    """Prints the images per second of the job and of the bare loop, in alternation on the same images and cores.

    Args:
        source: INPUT of `alit benchmark tokenize`.
        options: Its options.
        console: Receives the results.

    Raises:
        AlitError: The input, the weights or an option cannot be used.
    """
    weights, cores = load(options.weights), local_cpus()
    criterion = checked_criterion(weights, options.criterion or weights.model.config.criterion)
    plan = make_plan(source, rows_per_file=options.rows_per_file, image_column=options.image_column)
    bare, job, startup = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        described = describe_job(TokenizeOptions(), weights, criterion, plan.source, parse_uri(folder))
        described = _with_fastest_batch_size(described, plan, weights.model, cores, console)
        tokenize_options = TokenizeOptions(
            criterion=criterion,
            weights=options.weights,
            batch_size=described.batch_size,
            image_column=options.image_column,
            rows_per_file=options.rows_per_file,
            workers=options.workers,
        )
        for number in range(options.rounds):
            bare.append(bare_loop(described, plan, weights.model, cores))
            output = Path(folder) / str(number)
            summary = tokenize(source, str(output), tokenize_options, console)
            job.append(summary.images_per_second)
            startup.append(summary.startup)
            if options.rates is not None:
                size = sum(path.stat().st_size for path in output.rglob("*.parquet"))
                _rates(summary, size).save(options.rates)
            console.print(f"bare loop {bare[-1]:.1f} images/s, job {job[-1]:.1f} after {startup[-1]:.1f} s of start-up")
    result = TokenizeRates(bare=bare, job=job, startup=startup, batch_size=described.batch_size)
    console.print(f"{plan.images} images, {cores} cores: the job reaches {result.ratio:.1%} of the bare loop's rate")
    return result


def _with_fastest_batch_size(job: TokenizeJob, plan: Plan, model: Alit, threads: int, console: Console) -> TokenizeJob:
    """Returns the job with the batch size at which the bare loop is fastest on the first two shards."""
    sample = replace(plan, shards=plan.shards[:2])
    rates: dict[int, float] = {}
    for batch_size in BATCH_SIZES:
        rates[batch_size] = bare_loop(replace(job, batch_size=batch_size), sample, model, threads)
        console.print(f"bare loop, batches of {batch_size}: {rates[batch_size]:.1f} images/s")
    return replace(job, batch_size=max(rates, key=lambda size: rates[size]))


def _rates(summary: TokenizeSummary, size: int) -> Rates:
    """Returns a job's rates for `alit estimate`; `size` is that of its dataset, in bytes."""
    images = summary.totals.images
    return Rates(
        images_per_second=summary.images_per_second / summary.workers.count,
        startup=summary.startup,
        tokens=summary.totals.tokens(summary.metadata) / max(1, images),
        output_bytes=size / max(1, images + summary.totals.rejects),
        worker=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        images=summary.encoded,
        criterion=summary.metadata.criterion,
        weights=summary.metadata.fingerprint,
    )
