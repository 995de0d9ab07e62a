"""What jobs tell Prometheus, through Ray, which puts `ray_` before the names and adds the node and the process.

To be imported by modules, not in functions that run on workers: there `jobs` may be somebody else's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from alit.tokens import Metadata
from jobs.shards import Counts, Decoded, tokens_of


class TokenizeMetrics:
    """Of a process that holds the model.

    They tell of work: what is done again, after a process was lost, is counted again.

    Args:
        dataset: the output's path.
        metadata: of the dataset.
    """

    def __init__(self, dataset: str, metadata: Metadata) -> None:
        from ray.util import metrics

        tags = {"dataset": dataset}
        self.metadata = metadata
        self.images = metrics.Counter("alit_job_images_total", "Images encoded.", ("dataset",))
        self.tokens = metrics.Counter("alit_job_tokens_total", "Tokens given.", ("dataset",))
        self.rejects = metrics.Counter("alit_job_rejects_total", "Images rejected.", ("dataset", "reason"))
        self.waited = metrics.Counter(
            "alit_job_wait_seconds_total", "The model's waiting for decoded images.", ("dataset",)
        )
        self.lived = metrics.Counter(
            "alit_job_seconds_total", "The model's time with shards, waiting and all.", ("dataset",)
        )
        for metric in (self.images, self.tokens, self.rejects, self.waited, self.lived):
            metric.set_default_tags(tags)
        self._told = -1, 0, 0  # shard, and its images and tokens until now
        self._rejected: list[str] = []  # reasons, to be told with the images beside them

    def watched(self, batches: Iterator[Decoded]) -> Iterator[Decoded]:
        """The batches, having measured how long each was waited for, and noted its rejects."""
        began = time.monotonic()
        while True:
            asked = time.monotonic()
            decoded = next(batches, None)
            now = time.monotonic()
            _add(self.waited, now - asked)
            _add(self.lived, now - began)
            began = now
            if decoded is None:
                return
            self._rejected += [reason for reason, _ in decoded.rejects]
            yield decoded

    def count(self, counts: Counts) -> None:
        """Takes what is told of a shard, each time as much as it comes to by then."""
        tokens = tokens_of(counts.lengths, self.metadata)
        shard, images_before, tokens_before = self._told
        again = shard == counts.shard
        _add(self.images, counts.images - again * images_before)
        _add(self.tokens, tokens - again * tokens_before)
        self._told = counts.shard, counts.images, tokens
        for reason in self._rejected:
            self.rejects.inc(1, {"reason": reason})
        self._rejected = []


class TrainMetrics:
    """Of a training run, from the events of its `RunFolder`, in the worker that tells them.

    Args:
        run: the run folder's path.
    """

    def __init__(self, run: str) -> None:
        from ray.util import metrics

        names = {
            "step": ("alit_train_step", "Steps trained."),
            "loss": ("alit_train_loss", "Mean of the last steps."),
            "images_per_second": ("alit_train_images_per_second", "Of all workers together."),
            "waiting": ("alit_train_waiting_ratio", "Share of the time that workers wait for data."),
            "mfu": ("alit_train_mfu_ratio", "Floating-point operations over the GPUs' peak."),
        }
        self.gauges = {key: metrics.Gauge(name, about, ("run",)) for key, (name, about) in names.items()}
        self.saved = metrics.Gauge(
            "alit_train_checkpoint_timestamp_seconds", "Unix time since which work would be lost.", ("run",)
        )
        for gauge in (*self.gauges.values(), self.saved):
            gauge.set_default_tags({"run": run})
        self.saved.set(time.time())  # a worker begins at a checkpoint, or at nothing

    def tell(self, event: dict[str, Any]) -> None:
        """Takes one event."""
        for key, value in event.get("row", {}).items():
            if key in self.gauges:
                self.gauges[key].set(value)
        if "saved" in event:
            self.saved.set(time.time())


def _add(counter: Any, value: float) -> None:
    if value > 0:  # Ray refuses 0
        counter.inc(value)
