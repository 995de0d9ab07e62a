"""Reads ahead of a consumer, in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(iterator: Iterator[T], count: int, timeout: float | None = None) -> Iterator[T]:
    """Yields the items of an iterator while a thread computes the next ones.

    Args:
        iterator: Its items must not be None. It is advanced in the thread only.
        count: Number of items that are computed ahead.
        timeout: Maximum number of seconds to wait for an item; None to wait without a limit.

    Raises:
        TimeoutError: an item took longer than `timeout`.
    """
    thread = ThreadPoolExecutor(1)
    pending = deque(thread.submit(next, iterator, None) for _ in range(count))
    try:
        while (item := pending.popleft().result(timeout)) is not None:
            pending.append(thread.submit(next, iterator, None))
            yield item
    finally:
        thread.shutdown(wait=timeout is None, cancel_futures=True)
