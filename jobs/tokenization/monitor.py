"""Progress of a running job, and the limit on its reject rate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from alit.errors import AlitError
from jobs.dataset.counts import Counts
from jobs.dataset.folder import Totals
from jobs.dataset.plan import StoredPlan
from jobs.runtime.progress import job_bar

PLAINLY = 256
"""Images of which the share of rejects says something."""


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
