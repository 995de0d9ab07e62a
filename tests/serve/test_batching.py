"""Batches are filled while another one is computed, bounded by their cost, and without cancelled items."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serve.batching import Batcher, DeadlineExceededError


class Machine:
    """Answers an item with its double, `steps` iterations later; notes every batch."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.seconds, self.batches = seconds, []
        self.steps = 0

    async def begin(self, group: str, items: list[Any]) -> Iterator[dict[int, Any]]:
        self.batches.append((group, items))

        def rounds() -> Iterator[dict[int, Any]]:
            if "broken" in items:
                raise RuntimeError("this batch breaks")
            for number, item in enumerate(items):
                time.sleep(self.seconds)
                self.steps += 1
                yield {number: item * 2}

        return rounds()

    def batcher(self, max_cost: int = 12) -> Batcher:
        return Batcher(self.begin, ThreadPoolExecutor(1), max_cost=max_cost, wait_seconds=0.0)


def add(batcher: Batcher, item: Any, group: str = "a", cost: int = 1, seconds: float = 60) -> asyncio.Future[Any]:
    return batcher.add(item, group=group, cost=cost, deadline=time.monotonic() + seconds)


def test_batcher_fills_a_batch_while_another_runs() -> None:
    """Items that arrive while a batch is computed form the next batch, in order."""

    async def run() -> None:
        machine = Machine()
        batcher = machine.batcher()
        answers = []
        for item in range(30):
            answers.append(add(batcher, item))
            await asyncio.sleep(0.002)
        assert await asyncio.gather(*answers) == [2 * item for item in range(30)]
        sizes = [len(items) for _, items in machine.batches]
        assert sum(sizes) == 30
        assert max(sizes) == 12
        assert len(sizes) <= 6
        assert [item for _, items in machine.batches for item in items] == list(range(30))

    asyncio.run(run())


def test_batcher_bounds_the_cost_of_a_batch() -> None:
    """A batch is bounded by its cost, and an item above the bound forms a batch alone."""

    async def run() -> None:
        machine = Machine(0.001)
        batcher = machine.batcher(max_cost=10)
        costs = [4, 4, 4, 25, 1, 9, 1]
        answers = [add(batcher, i, cost=cost) for i, cost in enumerate(costs)]
        await asyncio.gather(*answers)
        assert [items for _, items in machine.batches] == [[0, 1], [2], [3], [4, 5], [6]]

    asyncio.run(run())


def test_batcher_keeps_groups_apart() -> None:
    """Items of different groups are in different batches, and the groups take turns."""

    async def run() -> None:
        machine = Machine(0.001)
        batcher = machine.batcher()
        answers = [add(batcher, i, group="ab"[i % 2]) for i in range(6)]
        await asyncio.gather(*answers)
        assert machine.batches == [("a", [0, 2, 4]), ("b", [1, 3, 5])]

    asyncio.run(run())


def test_batcher_answers_each_item_at_once() -> None:
    """Each item is answered as soon as it is done, before the end of its batch."""

    async def run() -> None:
        machine = Machine(0.1)
        batcher = machine.batcher()
        first, last = add(batcher, 1), add(batcher, 2)
        assert await first == 2
        assert not last.done()
        assert await last == 4

    asyncio.run(run())


def test_batcher_drops_cancelled_and_expired_items() -> None:
    """Items that are cancelled or past their deadline are not computed."""

    async def run() -> None:
        machine = Machine()
        batcher = machine.batcher(max_cost=2)
        busy = [add(batcher, 0), add(batcher, 1)]
        await asyncio.sleep(0.005)
        gone, late, stays = add(batcher, 10), add(batcher, 11, seconds=0.001), add(batcher, 12)
        gone.cancel()
        with pytest.raises(DeadlineExceededError):
            await late
        assert await stays == 24
        await asyncio.gather(*busy)
        assert [items for _, items in machine.batches] == [[0, 1], [12]]

    asyncio.run(run())


def test_batcher_stops_a_batch_without_clients() -> None:
    """A batch all of whose items are cancelled ends at once."""

    async def run() -> None:
        machine = Machine(0.05)
        batcher = machine.batcher()
        answers = [add(batcher, item) for item in range(10)]
        await asyncio.sleep(0.02)
        for answer in answers:
            answer.cancel()
        assert await add(batcher, 3) == 6
        assert machine.steps <= 3

    asyncio.run(run())


def test_batcher_confines_errors_to_their_batch() -> None:
    """An error in a batch fails its items and no others."""

    async def run() -> None:
        machine = Machine(0.001)
        batcher = machine.batcher(max_cost=2)
        bad, beside, good = add(batcher, "broken"), add(batcher, 1), add(batcher, 2)
        for answer in (bad, beside):
            with pytest.raises(RuntimeError, match="this batch breaks"):
                await answer
        assert await good == 4

    asyncio.run(run())
