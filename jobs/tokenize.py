"""The main job: images in, a dataset of adaptive-length tokens out, in one streaming pass of Ray Data.

The input is planned once, into the dataset; a row of the Ray dataset is the number of one of the plan's shards. One
actor reads, decodes, encodes and writes it, so that nothing but numbers and counts passes through the driver.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console

from alit.cost import inference_bytes
from alit.errors import AlitError
from alit.images import Limits
from alit.tokens import Metadata
from alit.weights import Weights
from jobs.estimate import describe_plan
from jobs.inputs import Input, open_input
from jobs.options import TokenizeOptions, labels
from jobs.output import JOB, Totals, clear, finish, read_record, read_totals, require_apart, require_same, unwritten
from jobs.plan import StoredPlan, read_plan, write_plan
from jobs.progress import counting, job_bar
from jobs.runner import await_room, local_cpus, ray_session, stop_on_sigterm, unwrapped
from jobs.shards import Counts, Job, metadata_of
from jobs.stages import Tokenizer
from jobs.storage import place, split_options
from jobs.weights import Shared, load

PLAINLY = 256
"""Images of which the share of rejects says something."""
TASKS_PER_WORKER = 32
SHARDS_PER_TASK = 64
CPUS_BESIDE_GPU = 0.5


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
    require_apart(place(source), found.source, place(output))
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
    folder, given = place(output), place(source)
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
    bare = split_options(source)[0] if "://" in source else place(source).path
    names = ("image_column", "id_column", "rows_per_file", "limit", "max_bytes", "max_pixels")
    return {"input": bare, "keep": list(options.keep)} | {name: getattr(options, name) for name in names}


def job_record(
    metadata: Metadata, source: str, options: TokenizeOptions, size: int, plan: StoredPlan
) -> dict[str, Any]:
    """What `_job.json` holds: all that it takes to go on, and to refuse to go on with something else."""
    return asdict(metadata) | _settings(source, options) | {"batch_size": size, "plan": plan.to_json()}


def batch_size(options: TokenizeOptions, before: dict[str, Any] | None, loaded: Weights) -> int:
    """The batch size that is asked for; of `auto` the one that a job was begun with, or one that fits the GPU."""
    if options.batch_size != "auto":
        return options.batch_size
    if before is not None:
        return int(before["batch_size"])
    if not torch.cuda.is_available():
        return 64
    room = torch.cuda.mem_get_info()[1] // 4
    return max(1, min(512, 1 << (room // inference_bytes(loaded.model.config)).bit_length() - 1))


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """The processes that hold the model, and where they run.

    Attributes:
        count: how many.
        gpus: of each.
        memory: bytes of heap that each is given room for; 0 for no such promise.
        labels: of the nodes they run on.
        decoders: tasks that decode for each of them.
        decode_labels: of the nodes that those run on.
    """

    count: int
    gpus: float = 0.0
    memory: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    decoders: int = 0
    decode_labels: dict[str, str] = field(default_factory=dict)

    @property
    def needs(self) -> dict[str, float]:
        """Of one of them, as Ray counts."""
        found = {"CPU": CPUS_BESIDE_GPU if self.gpus else 1.0, "GPU": self.gpus, "memory": self.memory}
        return {name: amount for name, amount in found.items() if amount}


def workers_for(options: TokenizeOptions, there: dict[str, float], shards: int) -> Workers:
    """As asked for, or as there is room for."""
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = float(there.get("GPU", 0) > 0)
    cpus = int(there.get("CPU", 1)) if os.environ.get("RAY_ADDRESS") else local_cpus()
    count = options.workers or max(1, int(there.get("GPU", 0) / gpus) if gpus else cpus)
    decoders = options.decode_workers
    if decoders is None:
        decoders = max(0, int((cpus - CPUS_BESIDE_GPU * count) // count)) if gpus else 0
    return Workers(
        count=min(count, shards),
        gpus=gpus,
        memory=int(options.worker_memory * 2**30),
        labels=labels("--worker-labels", options.worker_labels),
        decoders=decoders,
        decode_labels=labels("--decode-labels", options.decode_labels),
    )


def room_for(workers: Workers, patience: float) -> None:
    """Waits until the cluster has room for one of them, and beside it for a task that decodes."""
    wanted = [(workers.needs, workers.labels)]
    if workers.decoders:
        wanted.append(({"CPU": 1.0}, workers.decode_labels))
    await_room(wanted, patience)


def stages(job: Job, plan: StoredPlan, model: Shared, shards: Sequence[int], workers: Workers) -> Any:
    """The Ray dataset that tokenizes shards; its rows are `Counts`."""
    import ray

    # some shards to a task where there are many: each task costs the driver some milliseconds and some memory
    together = max(1, min(SHARDS_PER_TASK, len(shards) // (workers.count * TASKS_PER_WORKER)))
    blocks = [
        pa.table({"number": pa.array(shards[i : i + together], pa.int64())}) for i in range(0, len(shards), together)
    ]
    selector: dict[str, Any] = {"label_selector": workers.labels} if workers.labels else {}
    return ray.data.from_arrow(blocks).map_batches(
        Tokenizer,
        fn_constructor_args=(job, plan, model, workers.decoders, workers.decode_labels),
        batch_size=together,  # a block; with GPUs Ray Data will not take None
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers.count, max_tasks_in_flight_per_actor=2),
        num_cpus=workers.needs["CPU"],
        num_gpus=workers.gpus or None,
        memory=workers.memory or None,
        **selector,
    )


class Follower:
    """Watches the shards come in: shows how far the job is, counts, and stops it where most images are rejected.

    Attributes:
        totals: of the whole dataset; shards that are done are added.
        done: their numbers.
        encoded: images that they hold.
        seconds: since the first shard was started.
    """

    def __init__(self, plan: StoredPlan, totals: Totals, max_reject_rate: float, console: Console) -> None:
        self.plan, self.totals, self.max_reject_rate, self.console = plan, totals, max_reject_rate, console
        self.done: set[int] = set()
        self.encoded, self.seconds = 0, 0.0
        self._under_way: dict[int, Counts] = {}  # by shard: one that is tried again tells its progress again
        self._trouble = ""

    def follow(self, rows: Iterator[dict[str, Any]]) -> None:
        """Takes the job's rows as they come.

        Raises:
            AlitError: too many images are rejected.
        """
        before = self.totals.images + self.totals.rejects
        remaining = None if self.plan.images is None else self.plan.images - before
        started: float | None = None
        with job_bar(self.console) as bar:
            task = bar.add_task("starting Ray", total=remaining, rate="")
            for row in rows:
                counts = Counts(**row)
                if started is None:
                    started = time.monotonic() - counts.seconds
                    bar.update(task, description="tokenizing")
                through = self._take(counts)
                rate = through / max(1e-9, time.monotonic() - started)
                bar.update(task, completed=through, rate=f"{rate:.1f} images/s")
        self.seconds = time.monotonic() - started if started is not None else 0.0

    def _take(self, counts: Counts) -> int:
        if counts.done:
            self._under_way.pop(counts.shard, None)
            if counts.shard not in self.done:  # a task that is tried again tells again what it did
                self.done.add(counts.shard)
                self.totals.add(counts)
                self.encoded += counts.images + counts.rejects
        elif counts.shard not in self.done:
            self._under_way[counts.shard] = counts
        self._trouble = self._trouble or counts.trouble
        partly = self._under_way.values()
        rejects = self.totals.rejects + sum(c.rejects for c in partly)
        images = self.totals.images + sum(c.images for c in partly)
        if images + rejects >= PLAINLY and rejects > self.max_reject_rate * (images + rejects):
            raise AlitError(
                f"{rejects} of {images + rejects} images were rejected, more than --max-reject-rate "
                f"{self.max_reject_rate:g} allows; such as {self._trouble}. Finished files are kept: the same command "
                f"goes on, with another rate where this is as it should be"
            )
        return self.encoded + sum(c.images + c.rejects for c in partly)


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
        if metadata.criterion.partition(":")[0] != "fixed":
            console.print(f"{totals.satisfied} met the criterion {metadata.criterion}")
    if totals.rejects:
        console.print(f"reasons are in {summary.output}/_rejects")
    if summary.encoded:
        console.print(
            f"{summary.images_per_second:.1f} images/s over {summary.seconds:.1f} s; {summary.startup:.1f} s to start"
        )
    console.print(f"dataset: {summary.output}")
