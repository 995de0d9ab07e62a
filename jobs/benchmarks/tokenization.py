"""Throughput of the tokenization job beside a bare loop, as a ratio within one run."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from alit.dataset import metadata_of
from alit.encoding.criteria import parse
from alit.images.tensors import to_tensor
from alit.tokenizer import Alit
from jobs.runtime.process import keep_freed_memory, local_cpus
from jobs.runtime.weights import load
from jobs.sources.open import make_plan
from jobs.sources.records import Plan
from jobs.storage.path import parse_uri
from jobs.tokenization.capacity import Rates
from jobs.tokenization.job import Summary, tokenize
from jobs.tokenization.options import TokenizeOptions
from jobs.tokenization.shard import Job, decoded_batches


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeRates:
    """Images per second of the bare loop and of the job, round by round."""

    bare: list[float]
    job: list[float]
    startup: list[float]
    batch_size: int

    @property
    def ratio(self) -> float:
        """The job's rate over the bare loop's, the median of the rounds' own ratios."""
        return statistics.median(job / bare for job, bare in zip(self.job, self.bare, strict=True))


def bare_loop(job: Job, plan: Plan, model: Alit, threads: int) -> float:
    """Images per second of one process without Ray or files: torch threads = cores, decoding ahead in threads."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    criterion = parse(job.metadata.criterion)
    images, start = 0, time.perf_counter()
    for shard in plan.shards:
        for decoded in decoded_batches(job, shard, threads):
            model.encode(to_tensor(decoded.pixels), criterion)
            images += len(decoded.ids)
    return images / (time.perf_counter() - start)


def benchmark_tokenize(
    source: str,
    *,
    criterion: str | None,
    weights: str | None,
    rounds: int,
    image_column: str,
    rows_per_file: int,
    workers: int | None,
    rates_file: Path | None,
    console: Console,
) -> TokenizeRates:
    """Prints the job's images/s beside the bare loop's, in alternation over the same images on the same cores."""
    loaded = load(weights)
    plan = make_plan(source, rows_per_file=rows_per_file, image_column=image_column)
    cores, bare, ray, startup = local_cpus(), [], [], []
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            source=plan.source,
            output=parse_uri(folder),
            metadata=metadata_of(loaded, criterion or loaded.model.config.criterion),
        )
        rates = {}
        few = dataclasses.replace(plan, shards=plan.shards[:2])
        for batch_size in (16, 32, 64, 128):
            rates[batch_size] = bare_loop(dataclasses.replace(job, batch_size=batch_size), few, loaded.model, cores)
            console.print(f"bare loop, batches of {batch_size}: {rates[batch_size]:.1f} images/s")
        best = max(rates, key=lambda size: rates[size])
        for number in range(rounds):
            bare.append(bare_loop(dataclasses.replace(job, batch_size=best), plan, loaded.model, cores))
            summary = tokenize(
                source,
                str(Path(folder) / str(number)),
                TokenizeOptions(
                    criterion=job.metadata.criterion,
                    weights=weights,
                    batch_size=best,
                    image_column=image_column,
                    rows_per_file=rows_per_file,
                    workers=workers,
                ),
                console,
            )
            ray.append(summary.images_per_second)
            if rates_file is not None:
                files = (Path(folder) / str(number)).rglob("*.parquet")
                size = sum(path.stat().st_size for path in files)
                _measured(summary, size, workers or torch.cuda.device_count() or cores).save(rates_file)
            startup.append(summary.startup)
            console.print(f"bare loop {bare[-1]:.1f} images/s, job {ray[-1]:.1f} after {startup[-1]:.1f} s of start-up")
    result = TokenizeRates(bare=bare, job=ray, startup=startup, batch_size=best)
    console.print(f"{plan.images} images, {cores} cores: the job reaches {result.ratio:.1%} of the bare loop's rate")
    return result


def _measured(summary: Summary, size: int, workers: int) -> Rates:
    """A job's rates for `alit plan`; `size` is its dataset's, in bytes."""
    images = summary.totals.images
    return Rates(
        images_per_second=summary.images_per_second / workers,
        startup=summary.startup,
        tokens=summary.totals.tokens(summary.metadata) / max(1, images),
        output_bytes=size / max(1, images + summary.totals.rejects),
        worker=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        images=summary.encoded,
        criterion=summary.metadata.criterion,
        weights=summary.metadata.fingerprint,
    )
