"""Batches by the work in them: images wait while one is computed, and then go together, first come first served.

`ray.serve.batch` closes a batch after its waiting time even while another is computed, so that a busy replica would
compute many small ones; measured with one image every 20 ms: batches of one, where this gathers a dozen.
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
class Waiting:
    """An item on its way through a batch.

    Attributes:
        item: to compute.
        group: only items of one group go together.
        cost: work that it may take.
        until: `time.monotonic()` after which nobody wants its answer.
        arrived: likewise, when it came.
        answer: cancelled where nobody waits any more.
    """

    item: Any
    group: str
    cost: int
    until: float
    arrived: float
    answer: asyncio.Future[Any]


class Late(Exception):
    """An item's time was over before its turn."""


Rounds = Iterator[dict[int, Any]]
"""Answers by number in the batch, as they are found."""


class Batcher:
    """Gathers items into batches, and computes them one after the other.

    Args:
        begin: makes a group and its items ready, and returns what computes them.
        thread: in which that is computed, step by step.
        most: work in a batch; an item that costs more goes alone.
        wait: seconds for which a batch waits for more items when none waited before.
        watch: told of every batch that begins, and how many came too late.
    """

    def __init__(
        self,
        begin: Callable[[str, list[Any]], Awaitable[Rounds]],
        thread: Executor,
        *,
        most: int,
        wait: float,
        watch: Callable[[Sequence[Waiting], int], None] = lambda batch, late: None,
    ) -> None:
        self._begin, self._thread, self._most, self._wait, self._watch = begin, thread, most, wait, watch
        self._waiting: deque[Waiting] = deque()
        self._arrival = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def add(self, item: Any, *, group: str, cost: int, until: float) -> asyncio.Future[Any]:
        """An item's answer to be.

        Raises:
            Late: when awaited: its time was over before its turn.
        """
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(Waiting(item, group, cost, until, time.monotonic(), answer))
        self._arrival.set()
        return answer

    async def _run(self) -> None:
        while True:
            if not self._waiting:
                self._arrival.clear()
                await self._arrival.wait()
                await asyncio.sleep(self._wait)
            if batch := self._take():
                try:
                    await self._compute(batch)
                except Exception as error:
                    for waiting in batch:
                        if not waiting.answer.done():
                            waiting.answer.set_exception(error)

    def _take(self) -> list[Waiting]:
        """The next batch: of the first item's group, in order, as many as its work allows."""
        batch: list[Waiting] = []
        others: deque[Waiting] = deque()
        now, work, late = time.monotonic(), 0, 0
        while self._waiting:
            first = self._waiting.popleft()
            if first.answer.done():
                continue
            if first.until < now:
                late += 1
                first.answer.set_exception(Late())
            elif batch and first.group != batch[0].group:
                others.append(first)
            elif batch and work + first.cost > self._most:
                others.append(first)
                break
            else:
                batch.append(first)
                work += first.cost
        self._waiting.extendleft(reversed(others))
        self._watch(batch, late)
        return batch

    async def _compute(self, batch: list[Waiting]) -> None:
        rounds = await self._begin(batch[0].group, [waiting.item for waiting in batch])
        loop = asyncio.get_running_loop()
        while any(not waiting.answer.done() for waiting in batch):  # else all have gone
            found = await loop.run_in_executor(self._thread, next, rounds, None)
            if found is None:
                return
            for number, answer in found.items():
                if not batch[number].answer.done():
                    batch[number].answer.set_result(answer)
