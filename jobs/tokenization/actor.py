"""The actors of the main job on Ray: shard numbers in, files and counts out.

An image that crashes its decoder takes a process with it. On CPUs that is the actor: Ray starts it anew, and it goes
through the shard that was under way with care, decoding in tasks of their own. Before GPUs decoding is such a task
anyway. Either way a crash is narrowed down to the one image, which is rejected.
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
from jobs.runtime.weights import Shared
from jobs.sources.decode import Decoded, concatenate
from jobs.sources.read import read_batches
from jobs.sources.records import Rows, Shard
from jobs.tokenization.metrics import TokenizeMetrics
from jobs.tokenization.resources import Workers
from jobs.tokenization.shard import Job, decode_job, decoded_batches, tokenize_shard

READERS = 16
"""Images that are fetched side by side while their decoding is watched."""


BATCHES_AHEAD = 4
"""Decoded batches of a shard that may wait in Ray's memory."""


class Tokenizer:
    """The actor: loads the model once, then turns one shard after the other into files.

    Args:
        job: what to do.
        plan: where the shards are described.
        model: to encode with.
        decoders: shards whose images are decoded by tasks elsewhere, ahead of their turn; 0 decodes in this process.
        decode_labels: of the nodes on which those tasks run.
    """

    def __init__(self, job: Job, plan: StoredPlan, model: Shared, decoders: int, decode_labels: dict[str, str]) -> None:
        import ray

        torch.set_num_threads(job.threads)
        keep_freed_memory()
        self.job, self.plan, self.decoders = job, plan, decoders
        self.model = model.model()
        if torch.cuda.is_available():
            self.model = self.model.cuda()
        self.metrics = TokenizeMetrics(job.output.path, job.metadata)
        self.careful = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        options: dict[str, Any] = {"num_cpus": 1, "max_retries": 0, "num_returns": "streaming"}
        options |= {"_generator_backpressure_num_objects": BATCHES_AHEAD}
        options |= {"label_selector": decode_labels} if decode_labels else {}
        self.stream = ray.remote(_decode_shard).options(**options)
        self.decode = ray.remote(decode_job).options(num_cpus=0, max_retries=0)

    def __call__(self, numbers: pa.Table) -> Iterator[pa.Table]:
        shards = self._unwritten(numbers.column("number").to_pylist())
        ahead: deque[tuple[Shard, Any]] = deque()
        for item in shards:
            if isinstance(item, Counts):
                yield counts_table(item)
                continue
            ahead.append((item, self.stream.remote(self.job, item) if self.decoders else None))
            if len(ahead) > self.decoders:
                yield from self._tokenize(*ahead.popleft())
        while ahead:
            yield from self._tokenize(*ahead.popleft())

    def _unwritten(self, numbers: list[int]) -> Iterator[Shard | Counts]:
        """The shards to be done, and the counts of those that an earlier attempt at the same task has done."""
        for number in numbers:
            try:
                counts = written_counts(self.job.output, number)
            except (OSError, pa.ArrowException, KeyError, ValueError):
                counts = None  # damaged: written anew
            whole = counts is not None and (self.job.output / REJECTS / file_name(number)).exists()
            yield counts if counts is not None and whole else self.plan.shard(number)

    def _tokenize(self, shard: Shard, stream: Any) -> Iterator[pa.Table]:
        if stream is not None:
            batches = self._streamed(shard, stream)
        elif self.careful:
            self.careful = False  # what came after the shard that was under way is not suspect
            batches = self._carefully(shard)
        else:
            batches = decoded_batches(self.job, shard)
        for counts in tokenize_shard(self.job, self.model, shard, self.metrics.watched(batches)):
            self.metrics.count(counts)
            yield counts_table(counts)

    def _streamed(self, shard: Shard, stream: Any) -> Iterator[Decoded]:
        """Batches that a task elsewhere decodes; from where that task is lost, with care."""
        import ray
        from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

        taken = 0
        try:
            for reference in stream:
                yield ray.get(reference)
                taken += 1
        except (WorkerCrashedError, OutOfMemoryError, ObjectLostError, NodeDiedError):
            yield from self._carefully(shard, taken)

    def _carefully(self, shard: Shard, first: int = 0) -> Iterator[Decoded]:
        with ThreadPoolExecutor(READERS) as pool:
            job = self.job
            parts = read_batches(job.source, shard, job.batch_size, job.limits.max_bytes, pool)
            for rows in islice(parts, first, None):
                yield self._contained(rows)

    def _contained(self, rows: Rows, tries: int = 2) -> Decoded:
        """Decodes in a task; where that takes its process with it, in halves, down to the image that does it twice."""
        import ray
        from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

        try:
            return ray.get(self.decode.remote(self.job, rows))
        except (WorkerCrashedError, OutOfMemoryError, ObjectLostError, NodeDiedError):
            count = len(rows.ids)
            if count > 1:
                return concatenate([self._contained(half) for half in rows.slices(-(-count // 2))])
            if tries > 1:  # once may have been somebody else's doing
                return self._contained(rows, tries - 1)
            side = self.job.metadata.image_size
            pixels, sizes = np.zeros((0, side, side, 3), np.uint8), np.zeros((0, 2), np.uint32)
            reject = "decoder_crashed", "decoding this image ends the process that does it"
            return Decoded(rows.ids, np.array([False]), pixels, sizes, [reject], rows.kept)


def _decode_shard(job: Job, shard: Shard) -> Iterator[Decoded]:
    yield from decoded_batches(job, shard)


def counts_table(counts: Counts) -> pa.Table:
    """A row of the Ray dataset."""
    return pa.table({name: [value] for name, value in zip(Counts._fields, counts, strict=True)})


TASKS_PER_WORKER = 32


SHARDS_PER_TASK = 64


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
