"""The main job: images in, a dataset of adaptive-length tokens out, in one streaming pass of Ray Data.

The input is planned once, into the dataset; a row of the Ray dataset is the number of one of the plan's shards. One
actor reads, decodes, encodes and writes it, so that nothing but numbers and counts passes through the driver.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from alit.dataset import Metadata, metadata_of
from alit.encoding.criteria import criterion_name
from alit.images.formats import Limits
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
from jobs.runtime.session import ray_session, unwrapped
from jobs.runtime.signals import stop_on_sigterm
from jobs.runtime.weights import Shared, load
from jobs.sources.open import open_input
from jobs.sources.records import Input
from jobs.storage.path import parse_uri, split_options
from jobs.tokenization.actor import stages
from jobs.tokenization.dry_run import describe_plan
from jobs.tokenization.monitor import Follower
from jobs.tokenization.options import TokenizeOptions
from jobs.tokenization.resources import batch_size, room_for, workers_for
from jobs.tokenization.shard import Job


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a run of the job did.

    Attributes:
        totals: of the whole dataset.
        encoded: images that this run went through, rejects included; fewer than the dataset has when it went on.
        seconds: from the first shard's start to the last one's end, Ray's start-up not counted.
        startup: seconds before that.
        output: where the dataset lies.
    """

    totals: Totals
    encoded: int
    seconds: float
    startup: float
    output: str
    metadata: Metadata

    @property
    def images_per_second(self) -> float:
        return self.encoded / self.seconds if self.seconds else 0.0


def preview(source: str, output: str, options: TokenizeOptions, console: Console) -> None:
    """Prints what `tokenize` would do, writing nothing.

    Raises:
        AlitError: as `tokenize` would, of the input and the options.
    """
    loaded, metadata = _load(options)
    found = _open(source, options)
    require_apart(parse_uri(source), found.source, parse_uri(output))
    describe_plan(found, options, loaded, metadata, batch_size(options, None, loaded), output, console)


def tokenize(
    source: str, output: str, options: TokenizeOptions | None = None, console: Console | None = None
) -> Summary:
    """Tokenizes a corpus; the arguments are those of `alit tokenize`.

    Raises:
        AlitError: whatever a person can put right; the same command then goes on with what is written.
    """
    options, console = options or TokenizeOptions(), console or Console(stderr=True)
    loaded, metadata = _load(options)
    limits = Limits(max_bytes=options.max_bytes, max_pixels=options.max_pixels)
    folder, given = parse_uri(output), parse_uri(source)
    with stop_on_sigterm():
        before = read_record(folder, overwrite=options.overwrite)
        settings = _settings(source, options)
        size = batch_size(options, before, loaded)
        if before is not None:
            require_same(folder, before, asdict(metadata) | settings | {"batch_size": size})
            plan = read_plan(folder, given, before["plan"], settings)
        else:
            found = _open(source, options)
            require_apart(given, found.source, folder)
            if options.overwrite:
                clear(folder)
            with counting(console, "planning", "images found") as tell:
                plan = write_plan(folder, found, options.rows_per_file, options.limit, tell)
            record = job_record(metadata, source, options, size, plan)
            (folder / JOB).write(json.dumps(record, indent=1).encode())
        job = Job(
            source=plan.source,
            output=folder,
            metadata=metadata,
            batch_size=size,
            limits=limits,
            jpeg=options.jpeg,
        )
        return _run(job, plan, loaded, options, output, console)


def _load(options: TokenizeOptions) -> tuple[Weights, Metadata]:
    loaded = load(options.weights)
    criterion = options.criterion or loaded.model.config.criterion
    return loaded, metadata_of(loaded, criterion, precision=options.precision, jpeg=options.jpeg)


def _open(source: str, options: TokenizeOptions) -> Input:
    return open_input(
        source,
        rows_per_file=options.rows_per_file,
        keep=options.keep,
        image_column=options.image_column,
        id_column=options.id_column,
    )


def _settings(source: str, options: TokenizeOptions) -> dict[str, Any]:
    """What makes two runs the same job, beside what determines the tokens."""
    bare = split_options(source)[0] if "://" in source else parse_uri(source).path
    names = ("image_column", "id_column", "rows_per_file", "limit", "max_bytes", "max_pixels")
    return {"input": bare, "keep": list(options.keep)} | {name: getattr(options, name) for name in names}


def job_record(
    metadata: Metadata, source: str, options: TokenizeOptions, size: int, plan: StoredPlan
) -> dict[str, Any]:
    """What `_job.json` holds: all that it takes to go on, and to refuse to go on with something else."""
    return asdict(metadata) | _settings(source, options) | {"batch_size": size, "plan": plan.to_json()}


def _run(
    job: Job, plan: StoredPlan, loaded: Weights, options: TokenizeOptions, output: str, console: Console
) -> Summary:
    todo = unwritten(job.output, plan.shards).tolist()
    images = f"{plan.images} images" if plan.images is not None else "images"
    console.print(f"{images} in {plan.shards} shards, criterion {job.metadata.criterion}")
    totals = Totals()
    if done := sorted(set(range(plan.shards)).difference(todo)):
        console.print(f"going on: {len(done)} shards are already there")
        with counting(console, "reading their counts", "shards") as tell:
            totals = read_totals(job.output, done, tell)
    started = time.monotonic()
    follower = Follower(plan, totals, options.max_reject_rate, console)
    if todo:
        with ray_session() as ray, stop_on_sigterm(), unwrapped():  # Ray sets a handler of its own
            workers = workers_for(options, ray.cluster_resources(), len(todo))
            room_for(workers, options.patience)
            dataset = stages(job, plan, Shared.of(loaded.model), todo, workers)
            follower.follow(dataset.iter_rows())
    missing = set(todo) - follower.done
    assert not missing, f"every shard is done before the manifest, but for {sorted(missing)[:5]}"
    finish(job.output, job.metadata, plan, totals)
    return Summary(
        totals=totals,
        encoded=follower.encoded,
        seconds=follower.seconds,
        startup=time.monotonic() - started - follower.seconds,
        output=output,
        metadata=job.metadata,
    )


def describe(summary: Summary, console: Console) -> None:
    """Prints what a run did, for a person."""
    totals, metadata = summary.totals, summary.metadata
    tokens = totals.tokens(metadata)
    mean = tokens / max(1, totals.images)
    bits = mean * metadata.bits_per_token / metadata.image_size**2
    console.print(f"[bold]{totals.images}[/] images tokenized, [bold]{totals.rejects}[/] rejected")
    if totals.images:
        console.print(f"{mean:.1f} tokens per image, {bits:.4f} bits per pixel at {metadata.image_size} px")
        widest = max(totals.lengths)
        for k, count in enumerate(totals.lengths):
            bar = "█" * round(40 * count / widest)
            console.print(f"  {(k + 1) * metadata.latents_per_iteration:>4} tokens {count:>8}  {bar}", highlight=False)
        if criterion_name(metadata.criterion) != "fixed":
            console.print(f"{totals.satisfied} met the criterion {metadata.criterion}")
    if totals.rejects:
        console.print(f"reasons are in {summary.output}/_rejects")
    if summary.encoded:
        console.print(
            f"{summary.images_per_second:.1f} images/s over {summary.seconds:.1f} s; {summary.startup:.1f} s to start"
        )
    console.print(f"dataset: {summary.output}")
