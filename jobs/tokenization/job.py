"""The tokenization job: images in, a dataset of adaptive-length tokens out, in one streaming pass of Ray Data.

The input is planned once, and the plan is stored in the dataset; a row of the Ray dataset is the number of one shard.
One actor reads, decodes, encodes and writes it, so that only numbers and counts pass through the driver.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console

from alit.dataset import Metadata, checked_criterion
from alit.encoding.criteria import criterion_name
from alit.weights import Weights
from jobs.dataset.folder import (
    JOB,
    Totals,
    clear,
    finish,
    read_record,
    read_totals,
    require_apart,
    require_same,
    unwritten,
)
from jobs.dataset.plan import StoredPlan, read_plan, write_plan
from jobs.runtime.progress import counting
from jobs.runtime.resources import Workers, session_resources, wait_for_workers
from jobs.runtime.session import ray_session, unwrapped
from jobs.runtime.signals import stop_on_sigterm
from jobs.runtime.weights import SharedModel, load
from jobs.sources.open import open_input
from jobs.sources.records import Input
from jobs.storage.path import parse_uri, split_options
from jobs.tokenization.actor import tokenize_shards
from jobs.tokenization.description import TokenizeJob, describe_job, resolve_job_workers
from jobs.tokenization.dry_run import preview_job
from jobs.tokenization.monitor import ProgressMonitor
from jobs.tokenization.options import TokenizeOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeSummary:
    """The result of one run of the job.

    Attributes:
        totals: Counts of the whole dataset.
        encoded: Images that this run processed, rejects included; fewer than the dataset's if it resumed a job.
        seconds: From the first shard's start to the last one's end, without Ray's start-up.
        startup: Seconds before the first shard's start.
        output: The dataset's folder, as given.
        metadata: The dataset's provenance record.
        workers: The workers of this run.
    """

    totals: Totals
    encoded: int
    seconds: float
    startup: float
    output: str
    metadata: Metadata
    workers: Workers

    @property
    def images_per_second(self) -> float:
        """Throughput of all workers together, without start-up."""
        return self.encoded / self.seconds if self.seconds else 0.0


def preview(source: str, output: str, options: TokenizeOptions, console: Console) -> None:
    """Prints what `tokenize` would do, without writing anything.

    Args:
        source: INPUT of `alit tokenize`.
        output: OUTPUT of `alit tokenize`.
        options: Its options.
        console: Where it is printed.

    Raises:
        AlitError: The input or an option is invalid, as for `tokenize`.
    """
    weights, criterion = _load_weights(options)
    folder, opened = parse_uri(output), _open_source(source, options)
    require_apart(parse_uri(source), opened.source, folder)
    job = describe_job(options, weights, criterion, opened.source, folder)
    preview_job(opened, options, job, weights, output, console)


def tokenize(
    source: str, output: str, options: TokenizeOptions | None = None, console: Console | None = None
) -> TokenizeSummary:
    """Tokenizes a corpus, or resumes an interrupted job.

    Args:
        source: INPUT of `alit tokenize`.
        output: OUTPUT of `alit tokenize`.
        options: Its options.
        console: Where progress is shown; stderr by default.

    Returns:
        Counts and timings.

    Raises:
        AlitError: The input, the output or an option is invalid, or storage fails. Written files are kept, and the same
            call resumes.
    """
    options, console = options or TokenizeOptions(), console or Console(stderr=True)
    weights, criterion = _load_weights(options)
    folder, input_path = parse_uri(output), parse_uri(source)
    with stop_on_sigterm():
        record = read_record(folder, overwrite=options.overwrite)
        if record is not None:
            plan = read_plan(folder, input_path, record["plan"], _identity(source, options))
            batch_size = int(record["batch_size"])
            job = describe_job(options, weights, criterion, plan.source, folder, recorded_batch_size=batch_size)
            require_same(folder, record, job_settings(job, source, options))
        else:
            opened = _open_source(source, options)
            require_apart(input_path, opened.source, folder)
            job = describe_job(options, weights, criterion, opened.source, folder)
            if options.overwrite:
                clear(folder)
            with counting(console, "planning", "images found") as report:
                plan = write_plan(folder, opened, options.rows_per_file, options.limit, report)
            (folder / JOB).write(json.dumps(job_record(job, source, options, plan), indent=1).encode())
        return _run(job, plan, weights, options, output, console)


def _load_weights(options: TokenizeOptions) -> tuple[Weights, str]:
    """Loads the weights and returns them with the criterion, checked against them."""
    weights = load(options.weights)
    return weights, checked_criterion(weights, options.criterion or weights.model.config.criterion)


def _open_source(source: str, options: TokenizeOptions) -> Input:
    return open_input(
        source,
        rows_per_file=options.rows_per_file,
        keep=options.keep,
        image_column=options.image_column,
        id_column=options.id_column,
    )


def _identity(source: str, options: TokenizeOptions) -> dict[str, Any]:
    """Returns the settings that make two runs the same job, besides those that determine the tokens."""
    bare = split_options(source)[0] if "://" in source else parse_uri(source).path
    names = ("image_column", "id_column", "rows_per_file", "limit", "max_bytes", "max_pixels")
    return {"input": bare, "keep": list(options.keep)} | {name: getattr(options, name) for name in names}


def job_settings(job: TokenizeJob, source: str, options: TokenizeOptions) -> dict[str, Any]:
    """Returns the settings with which a job can be resumed.

    Args:
        job: The job's description.
        source: INPUT of `alit tokenize`.
        options: Its options.
    """
    return asdict(job.metadata) | _identity(source, options) | {"batch_size": job.batch_size}


def job_record(job: TokenizeJob, source: str, options: TokenizeOptions, plan: StoredPlan) -> dict[str, Any]:
    """Returns the contents of `_job.json`: the settings, and how to read the plan again.

    Args:
        job: The job's description.
        source: INPUT of `alit tokenize`.
        options: Its options.
        plan: The stored plan.
    """
    return job_settings(job, source, options) | {"plan": plan.to_json()}


def _run(
    job: TokenizeJob, plan: StoredPlan, weights: Weights, options: TokenizeOptions, output: str, console: Console
) -> TokenizeSummary:
    """Tokenizes the shards that are not yet written, and finishes the dataset."""
    todo = unwritten(job.output, plan.shards).tolist()
    images = f"{plan.images} images" if plan.images is not None else "images"
    console.print(f"{images} in {plan.shards} shards, criterion {job.criterion}")
    totals = Totals()
    if done := sorted(set(range(plan.shards)).difference(todo)):
        console.print(f"resuming: {len(done)} shards are already written")
        with counting(console, "reading their counts", "shards") as report:
            totals = read_totals(job.output, done, report)
    started = time.monotonic()
    monitor = ProgressMonitor(plan, totals, options.max_reject_rate, console)
    if todo:
        with ray_session() as ray, stop_on_sigterm(), unwrapped():  # once more, as Ray installs its own handler
            job = replace(job, workers=resolve_job_workers(options, session_resources(ray), len(todo)))
            wait_for_workers(job.workers, options.patience)
            dataset = tokenize_shards(job, plan, SharedModel.put(weights.model), todo)
            monitor.follow(dataset.iter_rows())
    missing = set(todo) - monitor.done
    assert not missing, f"the manifest must come after all shards, but {sorted(missing)[:5]} are missing"
    finish(job.output, job.metadata, plan, totals)
    return TokenizeSummary(
        totals=totals,
        encoded=monitor.encoded,
        seconds=monitor.seconds,
        startup=time.monotonic() - started - monitor.seconds,
        output=output,
        metadata=job.metadata,
        workers=job.workers,
    )


def print_summary(summary: TokenizeSummary, console: Console) -> None:
    """Prints counts, lengths and throughput of a run."""
    totals, metadata = summary.totals, summary.metadata
    tokens = totals.tokens(metadata)
    mean = tokens / max(1, totals.images)
    bits = mean * metadata.bits_per_token / metadata.image_size**2
    console.print(f"[bold]{totals.images}[/] images tokenized, [bold]{totals.rejects}[/] rejected")
    if totals.images:
        console.print(f"{mean:.1f} tokens per image, {bits:.4f} bits per pixel at {metadata.image_size} px")
        largest = max(totals.lengths)
        for k, count in enumerate(totals.lengths):
            bar = "█" * round(40 * count / largest)
            console.print(f"  {(k + 1) * metadata.latents_per_iteration:>4} tokens {count:>8}  {bar}", highlight=False)
        if criterion_name(metadata.criterion) != "fixed":
            console.print(f"{totals.satisfied} met the criterion {metadata.criterion}")
    if totals.rejects:
        console.print(f"the reasons are in {summary.output}/_rejects")
    if summary.encoded:
        rate = f"{summary.images_per_second:.1f} images/s over {summary.seconds:.1f} s"
        console.print(f"{rate}; {summary.startup:.1f} s to start")
    console.print(f"dataset: {summary.output}")
