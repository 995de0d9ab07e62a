"""The actors of a tokenization job on Ray: shard numbers in, files and counts out.

An image that crashes its decoder kills the process that decodes it. On CPUs that is the actor itself: Ray restarts it,
and it repeats the interrupted shard with every batch decoded in a task of its own. With GPUs decoding runs in tasks
anyway. In both cases the crash is narrowed down by bisection to one image, which is rejected.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from alit.dataset import REJECTS
from jobs.dataset.counts import Counts, file_name, written_counts
from jobs.dataset.plan import StoredPlan
from jobs.runtime.process import keep_freed_memory
from jobs.runtime.weights import SharedModel
from jobs.sources.decode import Decoded, concatenate
from jobs.sources.read import read_batches
from jobs.sources.records import Rows, Shard
from jobs.tokenization.description import TokenizeJob
from jobs.tokenization.metrics import TokenizeMetrics
from jobs.tokenization.shard import decode_batch, decoded_batches, tokenize_shard

READERS = 16
"""Images that are fetched concurrently while batches are decoded in isolation."""

BATCHES_AHEAD = 4
"""Decoded batches of one shard that may wait in Ray's object store."""

TASKS_PER_WORKER = 32
"""Ray tasks per worker, where there are enough shards: fewer would leave workers idle at the end."""

SHARDS_PER_TASK = 64
"""The most shards in one task: a lost task is repeated as a whole."""


class Tokenizer:
    """The actor: loads the model once, then turns one shard after another into files.

    Args:
        job: The job's description.
        plan: Describes the shards.
        model: The model to encode with.
    """

    def __init__(self, job: TokenizeJob, plan: StoredPlan, model: SharedModel) -> None:
        import ray

        torch.set_num_threads(job.threads)
        keep_freed_memory()
        self.job, self.plan = job, plan
        self.model = model.get()
        if torch.cuda.is_available():
            self.model = self.model.cuda()
        self.metrics = TokenizeMetrics(job.output.path, job.config)
        self.isolate_next = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        options: dict[str, Any] = {"num_cpus": 1, "max_retries": 0, "num_returns": "streaming"}
        options |= {"_generator_backpressure_num_objects": BATCHES_AHEAD}
        options |= {"label_selector": job.workers.decode_labels} if job.workers.decode_labels else {}
        self.stream_task = ray.remote(_decode_shard).options(**options)
        self.decode_task = ray.remote(decode_batch).options(num_cpus=0, max_retries=0)

    def __call__(self, numbers: pa.Table) -> Iterator[pa.Table]:
        """Tokenizes the shards whose numbers a table lists; yields their counts."""
        decoders = self.job.workers.decoders
        ahead: deque[tuple[Shard, Any]] = deque()
        for item in self._unwritten(numbers.column("number").to_pylist()):
            if isinstance(item, Counts):
                yield counts_table(item)
                continue
            ahead.append((item, self.stream_task.remote(self.job, item) if decoders else None))
            if len(ahead) > decoders:
                yield from self._tokenize(*ahead.popleft())
        while ahead:
            yield from self._tokenize(*ahead.popleft())

    def _unwritten(self, numbers: list[int]) -> Iterator[Shard | Counts]:
        """Yields the shards to do, and the counts of those that an earlier attempt at the same task has written."""
        for number in numbers:
            try:
                counts = written_counts(self.job.output, number)
            except (OSError, pa.ArrowException, KeyError, ValueError):
                counts = None  # a damaged file is written again
            complete = counts is not None and (self.job.output / REJECTS / file_name(number)).exists()
            yield counts if counts is not None and complete else self.plan.shard(number)

    def _tokenize(self, shard: Shard, stream: Any) -> Iterator[pa.Table]:
        if stream is not None:
            batches = self._streamed(shard, stream)
        elif self.isolate_next:
            self.isolate_next = False  # only the shard that was interrupted is suspect
            batches = self._decode_isolated(shard)
        else:
            batches = decoded_batches(self.job, shard)
        for counts in tokenize_shard(self.job, self.model, shard, self.metrics.watched(batches)):
            self.metrics.count(counts)
            yield counts_table(counts)

    def _streamed(self, shard: Shard, stream: Any) -> Iterator[Decoded]:
        """Yields the batches of a decode task; where that task is lost, the remaining ones are decoded in isolation."""
        import ray
        from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

        received = 0
        try:
            for reference in stream:
                yield ray.get(reference)
                received += 1
        except (WorkerCrashedError, OutOfMemoryError, ObjectLostError, NodeDiedError):
            yield from self._decode_isolated(shard, received)

    def _decode_isolated(self, shard: Shard, first: int = 0) -> Iterator[Decoded]:
        """Decodes a shard's batches from number `first` on, each in a task of its own."""
        job = self.job
        with ThreadPoolExecutor(READERS) as pool:
            batches = read_batches(job.source, shard, job.batch_size, job.limits.max_bytes, pool)
            for rows in islice(batches, first, None):
                yield self._decode_bisecting(rows)

    def _decode_bisecting(self, rows: Rows, attempts: int = 2) -> Decoded:
        """Decodes rows in a task; halves them when it crashes, down to the one image that crashes it repeatedly."""
        import ray
        from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

        try:
            return ray.get(self.decode_task.remote(self.job, rows))
        except (WorkerCrashedError, OutOfMemoryError, ObjectLostError, NodeDiedError):
            count = len(rows.ids)
            if count > 1:
                return concatenate([self._decode_bisecting(half) for half in rows.slices(-(-count // 2))])
            if attempts > 1:  # retry once: the first crash may have been unrelated (e.g. an OOM kill)
                return self._decode_bisecting(rows, attempts - 1)
            side = self.job.config.image_size
            pixels, sizes = np.zeros((0, side, side, 3), np.uint8), np.zeros((0, 2), np.uint32)
            reject = "decoder_crashed", "decoding this image ends the process that does it"
            return Decoded(rows.ids, np.array([False]), pixels, sizes, [reject], rows.kept)


def _decode_shard(job: TokenizeJob, shard: Shard) -> Iterator[Decoded]:
    yield from decoded_batches(job, shard)


def counts_table(counts: Counts) -> pa.Table:
    """Returns counts as one row of the Ray dataset."""
    return pa.table({name: [value] for name, value in zip(Counts._fields, counts, strict=True)})


def tokenize_shards(job: TokenizeJob, plan: StoredPlan, model: SharedModel, shards: Sequence[int]) -> Any:
    """Returns the lazy Ray dataset that tokenizes shards; its rows are `Counts`.

    Args:
        job: The job's description, with its workers.
        plan: Describes the shards.
        model: The model to encode with.
        shards: Numbers of the shards to do.
    """
    import ray

    workers = job.workers
    # several shards per task where there are many: each task costs the driver milliseconds and memory
    per_task = max(1, min(SHARDS_PER_TASK, len(shards) // (workers.count * TASKS_PER_WORKER)))
    blocks = [
        pa.table({"number": pa.array(shards[i : i + per_task], pa.int64())}) for i in range(0, len(shards), per_task)
    ]
    selector: dict[str, Any] = {"label_selector": workers.labels} if workers.labels else {}
    return ray.data.from_arrow(blocks).map_batches(
        Tokenizer,
        fn_constructor_args=(job, plan, model),
        batch_size=per_task,  # one block; with GPUs Ray Data does not accept None
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers.count, max_tasks_in_flight_per_actor=2),
        num_cpus=workers.requirements["CPU"],
        num_gpus=workers.gpus or None,
        memory=workers.memory or None,
        **selector,
    )
