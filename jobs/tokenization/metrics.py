"""What jobs tell Prometheus, through Ray, which puts `ray_` before the names and adds the node and the process.

To be imported by modules, not in functions that run on workers: there `jobs` may be somebody else's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from alit.dataset import Metadata
from jobs.dataset.counts import Counts, tokens_of
from jobs.runtime.metrics import add_positive
from jobs.sources.decode import Decoded


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
            add_positive(self.waited, now - asked)
            add_positive(self.lived, now - began)
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
        add_positive(self.images, counts.images - again * images_before)
        add_positive(self.tokens, tokens - again * tokens_before)
        self._told = counts.shard, counts.images, tokens
        for reason in self._rejected:
            self.rejects.inc(1, {"reason": reason})
        self._rejected = []
