"""Bytes to pixels, batch by batch; an image that fails is a reject of its own.

Shapes: B batch, G images that were decoded, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from alit.images.decode import JpegMode, decode_image
from alit.images.formats import ImageError, Limits
from jobs.sources.read import read_batches
from jobs.sources.records import Plan, Rows


def joined(parts: list[Decoded]) -> Decoded:
    """Batches as one."""
    return Decoded(
        [name for part in parts for name in part.ids],
        np.concatenate([part.good for part in parts]),
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        [reject for part in parts for reject in part.rejects],
        [pa.concat_arrays(columns) for columns in zip(*(part.kept for part in parts), strict=True)],
    )


DECODE_THREADS = 2


class Decoded(NamedTuple):
    """A batch after decoding: pixels of the good images, reasons for the others."""

    ids: list[str]
    good: np.ndarray
    """Which of them were decoded, bool [B]."""
    pixels: np.ndarray
    """Of the good ones, uint8 [G, S, S, 3]."""
    sizes: np.ndarray
    """Width and height of the good ones' sources, [G, 2]."""
    rejects: list[tuple[str, str]]
    """Reason and message of the others, in order."""
    kept: list[pa.Array]


def decode_rows(
    rows: Rows, size: int, limits: Limits, run: Callable[..., Any] = map, jpeg: JpegMode = "full"
) -> Decoded:
    """Bytes to pixels, one image's failure being its own; `run` maps (a thread pool's, for speed)."""

    def decode(data: bytes | None, error: str | None) -> Any:
        if data is None:
            return "unreadable", error or "there are no bytes"
        try:
            return decode_image(data, size, limits, jpeg)
        except ImageError as problem:
            return problem.reason, str(problem)

    results = list(run(decode, rows.data, rows.errors))
    good = np.array([hasattr(result, "pixels") for result in results], bool)
    images = [result for result in results if hasattr(result, "pixels")]
    pixels = np.stack([image.pixels for image in images]) if images else np.zeros((0, size, size, 3), np.uint8)
    sizes = np.array([(image.width, image.height) for image in images], np.uint32).reshape(-1, 2)
    rejects = [result for result in results if not hasattr(result, "pixels")]
    return Decoded(rows.ids, good, pixels, sizes, rejects, rows.kept)


def decoded_plan(plan: Plan, size: int, batch_size: int) -> Iterator[Decoded]:
    """A whole input's images in batches, for those who only look at the first ones."""
    limits = Limits()
    with ThreadPoolExecutor() as pool:
        for shard in plan.shards:
            for rows in read_batches(plan.source, shard, batch_size, limits.max_bytes, pool):
                yield decode_rows(rows, size, limits, pool.map)
