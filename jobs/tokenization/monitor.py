"""Progress of a running job, and the limit on its reject rate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from alit.validation import require
from jobs.dataset.counts import Counts
from jobs.dataset.folder import Totals
from jobs.dataset.plan import StoredPlan
from jobs.runtime.progress import job_bar

MIN_IMAGES_FOR_REJECT_RATE = 256
"""The reject rate is not enforced below this many images."""


class ProgressMonitor:
    """Follows the progress of shards: shows it, sums it up, and stops the job where too many images are rejected.

    Attributes:
        totals: Counts of the whole dataset; shards are added when they are done.
        done: Numbers of the shards that this run has finished.
        encoded: Images in those shards, rejects included.
        seconds: Duration since the first shard was started.
    """

    def __init__(self, plan: StoredPlan, totals: Totals, max_reject_rate: float, console: Console) -> None:
        self.plan, self.totals, self.max_reject_rate, self.console = plan, totals, max_reject_rate, console
        self.done: set[int] = set()
        self.encoded, self.seconds = 0, 0.0
        self._partial: dict[int, Counts] = {}  # by shard, as a shard that is retried reports its progress again
        self._first_reject = ""

    def follow(self, rows: Iterator[dict[str, Any]]) -> None:
        """Consumes the job's rows as they arrive.

        Args:
            rows: The fields of `Counts`.

        Raises:
            AlitError: Too many images are rejected.
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
                completed = self._add(counts)
                rate = completed / max(1e-9, time.monotonic() - started)
                bar.update(task, completed=completed, rate=f"{rate:.1f} images/s")
        self.seconds = time.monotonic() - started if started is not None else 0.0

    def _add(self, counts: Counts) -> int:
        """Adds one report; returns the number of images processed so far, unfinished shards included."""
        if counts.done:
            self._partial.pop(counts.shard, None)
            if counts.shard not in self.done:  # a task that is retried reports its finished shards again
                self.done.add(counts.shard)
                self.totals.add(counts)
                self.encoded += counts.images + counts.rejects
        elif counts.shard not in self.done:
            self._partial[counts.shard] = counts
        self._first_reject = self._first_reject or counts.first_reject
        partial = self._partial.values()
        rejects = self.totals.rejects + sum(c.rejects for c in partial)
        images = self.totals.images + rejects + sum(c.images for c in partial)
        require(
            images < MIN_IMAGES_FOR_REJECT_RATE or rejects <= self.max_reject_rate * images,
            f"{rejects} of {images} images were rejected, more than --max-reject-rate {self.max_reject_rate:g} allows; "
            f"for example {self._first_reject}. Finished files are kept: run the same command again to resume, with a "
            f"higher rate if so many rejects are expected",
        )
        return self.encoded + sum(c.images + c.rejects for c in partial)
