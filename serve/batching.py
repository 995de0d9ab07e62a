"""Dynamic batching by cost: items queue while a batch is computed, and the next batch takes them in order of arrival.

`ray.serve.batch` closes a batch after its waiting time even while another is computed, so that a busy replica would
compute many small batches. Measured with one image every 20 ms: batches of one, where this batcher gathers a dozen.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False, slots=True)
class QueuedItem:
    """An item in the queue or in a batch.

    Attributes:
        item: The item to compute.
        group: A batch contains only items of one group.
        cost: The item's share of a batch's maximum cost.
        deadline: The `time.monotonic()` after which the item is not computed any more.
        arrival: The `time.monotonic()` at which the item was added.
        future: The item's result; cancelled if the caller no longer waits for it.
    """

    item: Any
    group: str
    cost: int
    deadline: float
    arrival: float
    future: asyncio.Future[Any]


class DeadlineExceededError(Exception):
    """Raised for an item whose deadline passed while it was queued."""


Steps = Iterator[dict[int, Any]]
"""The computation of a batch: every step yields the results that are complete, by position in the batch."""


class Batcher:
    """Gathers items into batches and computes one batch at a time.

    Args:
        begin: Prepares the items of one group and returns the computation of the batch.
        executor: Runs the computation, step by step.
        max_cost: The maximum total cost of a batch; an item that exceeds it forms a batch of its own.
        wait_seconds: How long a batch waits for further items if the queue was empty.
        on_batch: Called with every new batch and the number of items whose deadline has passed since the last one.
    """

    def __init__(
        self,
        begin: Callable[[str, list[Any]], Awaitable[Steps]],
        executor: Executor,
        *,
        max_cost: int,
        wait_seconds: float,
        on_batch: Callable[[Sequence[QueuedItem], int], None] = lambda batch, expired: None,
    ) -> None:
        self._begin, self._executor, self._on_batch = begin, executor, on_batch
        self._max_cost, self._wait_seconds = max_cost, wait_seconds
        self._queue: deque[QueuedItem] = deque()
        self._item_added = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def add(self, item: Any, *, group: str, cost: int, deadline: float) -> asyncio.Future[Any]:
        """Queues an item.

        Args:
            item: The item to compute.
            group: The item's group.
            cost: The item's cost.
            deadline: The `time.monotonic()` after which the item is not computed any more.

        Returns:
            The item's result. Awaiting it raises `DeadlineExceededError` if the deadline passed in the queue.
        """
        future = asyncio.get_running_loop().create_future()
        self._queue.append(QueuedItem(item, group, cost, deadline, time.monotonic(), future))
        self._item_added.set()
        return future

    async def _run(self) -> None:
        while True:
            if not self._queue:
                self._item_added.clear()
                await self._item_added.wait()
                await asyncio.sleep(self._wait_seconds)
            if batch := self._take_batch():
                try:
                    await self._compute(batch)
                except Exception as error:
                    for queued in batch:
                        if not queued.future.done():
                            queued.future.set_exception(error)

    def _take_batch(self) -> list[QueuedItem]:
        """Removes the next batch from the queue: items of the first item's group, in order, up to the maximum cost."""
        batch: list[QueuedItem] = []
        remaining: deque[QueuedItem] = deque()
        now, cost, expired = time.monotonic(), 0, 0
        while self._queue:
            first = self._queue.popleft()
            if first.future.done():
                continue
            if first.deadline < now:
                expired += 1
                first.future.set_exception(DeadlineExceededError())
            elif batch and first.group != batch[0].group:
                remaining.append(first)
            elif batch and cost + first.cost > self._max_cost:
                remaining.append(first)
                break
            else:
                batch.append(first)
                cost += first.cost
        self._queue.extendleft(reversed(remaining))
        self._on_batch(batch, expired)
        return batch

    async def _compute(self, batch: list[QueuedItem]) -> None:
        steps = await self._begin(batch[0].group, [queued.item for queued in batch])
        loop = asyncio.get_running_loop()
        while any(not queued.future.done() for queued in batch):  # all done: complete, or abandoned by their callers
            results = await loop.run_in_executor(self._executor, next, steps, None)
            if results is None:
                return
            for position, result in results.items():
                if not batch[position].future.done():
                    batch[position].future.set_result(result)
