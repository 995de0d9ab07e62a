"""The main job: images in, a dataset of adaptive-length tokens out, in one streaming pass of Ray Data.

One row of the Ray dataset is one shard, from the plan to the files: Ray Data splits blocks, never a row. On CPUs one
actor reads, decodes, encodes and writes; before GPU actors a stage of CPU tasks decodes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
from rich import progress as bars
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from alit.errors import AlitError
from alit.images import Limits
from alit.weights import load_weights
from jobs.inputs import Shard, make_plan
from jobs.output import Totals, finish, prepare_output, read_totals, require_apart
from jobs.runner import local_cpus, ray_session
from jobs.shards import SHARD_SCHEMA, DecodeStage, Job, Progress, Tokenizer, metadata_of
from jobs.storage import place


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
    job: Job

    @property
    def images_per_second(self) -> float:
        return self.encoded / self.seconds if self.seconds else 0.0


def tokenize(
    source: str,
    output: str,
    *,
    criterion: str | None = None,
    weights: str | None = None,
    batch_size: int = 64,
    rows_per_file: int = 1024,
    keep: Sequence[str] = (),
    image_column: str = "image",
    id_column: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    decode_workers: int | None = None,
    gpus_per_worker: float | None = None,
    limits: Limits | None = None,
    console: Console | None = None,
) -> Summary:
    """Tokenizes a corpus; the arguments are those of `alit tokenize`.

    Raises:
        AlitError: whatever a person can put right, before anything is written.
    """
    for option, value, least in (
        ("--workers", workers, 1),
        ("--decode-workers", decode_workers, 0),
        ("--gpus-per-worker", gpus_per_worker, 0),
    ):
        if value is not None and not least <= value < math.inf:
            raise AlitError(f"{option} must be at least {least}, got {value}")
    console = console or Console(stderr=True)
    loaded = load_weights(weights)
    metadata = metadata_of(loaded, criterion or loaded.model.config.criterion)
    plan = make_plan(source, rows_per_file=rows_per_file, keep=keep, image_column=image_column, id_column=id_column)
    job = Job(
        source=plan.source,
        output=place(output),
        metadata=metadata,
        weights=str(loaded.folder.resolve()),
        batch_size=batch_size,
        limits=limits or Limits(),
    )
    require_apart(place(source), job)
    todo = prepare_output(job, plan, rows_per_file, overwrite=overwrite)
    done = {shard.number for shard in plan.shards} - {shard.number for shard in todo}
    console.print(f"{plan.images} images in {len(plan.shards)} shards, criterion {metadata.criterion}")
    if done:
        console.print(f"going on: {len(done)} shards are already there")
    totals = read_totals(job, sorted(done))
    started = time.monotonic()
    finished: list[Progress] = []
    seconds = 0.0
    if todo:
        with ray_session() as ray:
            gpus = gpus_per_worker if gpus_per_worker is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
            count = workers or max(1, int(ray.cluster_resources().get("GPU", 0)) if gpus else local_cpus())
            count = min(count, len(todo))
            dataset = stages(
                job,
                todo,
                workers=count,
                decode_workers=(local_cpus() if gpus else 0) if decode_workers is None else decode_workers,
                gpus=gpus,
            )
            try:
                finished, seconds = _follow(dataset, sum(shard.rows for shard in todo), console)
            except AlitError as error:  # a worker's: Ray's own exception has its class, and a page of traceback as text
                raise AlitError(str(getattr(error, "cause", error)).splitlines()[0]) from None  # Ray adds lines
    assert {p.shard for p in finished} == {shard.number for shard in todo}, "every shard is done before the manifest"
    for progress in finished:
        totals.add(progress)
    finish(job, plan, totals)
    return Summary(
        totals=totals,
        encoded=sum(p.images + p.rejects for p in finished),
        seconds=seconds,
        startup=time.monotonic() - started - seconds,
        output=output,
        job=job,
    )


def stages(job: Job, shards: Sequence[Shard], *, workers: int, decode_workers: int, gpus: float = 0.0) -> Any:
    """The Ray dataset that tokenizes shards; its rows are `Progress`."""
    import ray

    blocks = [
        pa.Table.from_pylist([asdict(shard)], SHARD_SCHEMA) for shard in shards
    ]  # one block, so one task, per shard
    dataset = ray.data.from_arrow(blocks)
    if decode_workers:
        dataset = dataset.map_batches(
            DecodeStage(job),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            compute=ray.data.TaskPoolStrategy(size=decode_workers),
        )
    return dataset.map_batches(
        Tokenizer,
        fn_constructor_args=(job,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=0.5 if gpus else 1,
        num_gpus=gpus or None,
    )


def _follow(dataset: Any, images: int, console: Console) -> tuple[list[Progress], float]:
    """Runs the dataset, showing how far it is; the finished shards, and the seconds they took together."""
    latest: dict[int, Progress] = {}  # by shard: a retried one tells its progress again
    started: float | None = None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console) as bar:
        task = bar.add_task("starting Ray", total=images, rate="")
        for row in dataset.iter_rows():
            progress = Progress(**row)
            if started is None:
                started = time.monotonic() - progress.seconds
                bar.update(task, description="tokenizing")
            latest[progress.shard] = progress
            through = sum(p.images + p.rejects for p in latest.values())
            rate = through / max(1e-9, time.monotonic() - started)
            bar.update(task, completed=through, rate=f"{rate:.1f} images/s")
    seconds = time.monotonic() - started if started is not None else 0.0
    return [p for p in latest.values() if p.done], seconds


def describe(summary: Summary, console: Console) -> None:
    """Prints what a run did, for a person."""
    totals, metadata = summary.totals, summary.job.metadata
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
        if metadata.criterion.partition(":")[0] != "fixed":
            console.print(f"{totals.satisfied} met the criterion {metadata.criterion}")
    if totals.rejects:
        console.print(f"reasons are in {summary.output}/_rejects")
    if summary.encoded:
        console.print(
            f"{summary.images_per_second:.1f} images/s over {summary.seconds:.1f} s; {summary.startup:.1f} s to start"
        )
    console.print(f"dataset: {summary.output}")
