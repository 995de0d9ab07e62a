"""Reading ahead in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterator[T], count: int, patience: float | None = None) -> Iterator[T]:
    """The same items, of which the next ones are made in a thread meanwhile.

    Raises:
        TimeoutError: one was waited for longer than `patience` seconds.
    """
    thread = ThreadPoolExecutor(1)
    waiting = deque(thread.submit(next, items, None) for _ in range(count))
    try:
        while (item := waiting.popleft().result(patience)) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item
    finally:
        thread.shutdown(wait=patience is None, cancel_futures=True)
