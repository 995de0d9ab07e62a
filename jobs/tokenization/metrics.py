"""Prometheus metrics of tokenization jobs, exported by Ray, which prefixes `ray_` and adds node and process labels.

Import this module at the top of modules, not inside functions: on workers the name `jobs` may resolve to the user's own
package.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from alit.model.config import AlitConfig
from jobs.dataset.counts import Counts, tokens_of
from jobs.runtime.metrics import add_positive
from jobs.sources.decode import Decoded


class TokenizeMetrics:
    """Metrics of one process that holds the model.

    They measure work done: work that is repeated after a process was lost is counted again.

    Args:
        dataset: The output's path.
        config: The model's configuration.
    """

    def __init__(self, dataset: str, config: AlitConfig) -> None:
        from ray.util import metrics

        tags = {"dataset": dataset}
        self.config = config
        self.images = metrics.Counter("alit_job_images_total", "Images encoded.", ("dataset",))
        self.tokens = metrics.Counter("alit_job_tokens_total", "Tokens written.", ("dataset",))
        self.rejects = metrics.Counter("alit_job_rejects_total", "Images rejected, by reason.", ("dataset", "reason"))
        self.wait_seconds = metrics.Counter(
            "alit_job_wait_seconds_total", "Seconds that the model waited for decoded images.", ("dataset",)
        )
        self.total_seconds = metrics.Counter(
            "alit_job_seconds_total", "Seconds spent on shards, including the waiting.", ("dataset",)
        )
        for metric in (self.images, self.tokens, self.rejects, self.wait_seconds, self.total_seconds):
            metric.set_default_tags(tags)
        self._last_reported = -1, 0, 0  # shard number, and its images and tokens so far
        self._reject_reasons: list[str] = []  # exported together with the images beside them

    def watched(self, batches: Iterator[Decoded]) -> Iterator[Decoded]:
        """Yields the batches unchanged, measuring how long each was waited for and recording its rejects."""
        last = time.monotonic()
        while True:
            requested = time.monotonic()
            decoded = next(batches, None)
            now = time.monotonic()
            add_positive(self.wait_seconds, now - requested)
            add_positive(self.total_seconds, now - last)
            last = now
            if decoded is None:
                return
            self._reject_reasons += [reason for reason, _ in decoded.rejects]
            yield decoded

    def count(self, counts: Counts) -> None:
        """Exports progress.

        Args:
            counts: Cumulative counts for the shard.
        """
        tokens = tokens_of(counts.lengths, self.config.latents_per_iteration)
        shard, images_before, tokens_before = self._last_reported
        if shard != counts.shard:
            images_before = tokens_before = 0
        add_positive(self.images, counts.images - images_before)
        add_positive(self.tokens, tokens - tokens_before)
        self._last_reported = counts.shard, counts.images, tokens
        for reason in self._reject_reasons:
            self.rejects.inc(1, {"reason": reason})
        self._reject_reasons = []
