"""Decodes batches of encoded images to pixels; an image that cannot be decoded becomes a reject.

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

DECODE_THREADS = 2
"""Threads that decode the images of one batch."""


class Decoded(NamedTuple):
    """A batch after decoding: the pixels of the good images and the reasons for the rejects."""

    ids: list[str]
    """The ids of all images, good or not, [B]."""
    good: np.ndarray
    """Which images were decoded, bool [B]."""
    pixels: np.ndarray
    """The pixels of the good images, uint8 [G, S, S, 3]."""
    sizes: np.ndarray
    """Width and height of the good images before they were resized, uint32 [G, 2]."""
    rejects: list[tuple[str, str]]
    """Reason and message of the others, in order."""
    kept: list[pa.Array]
    """The kept columns, with one value for each of the B images."""


def concatenate(batches: list[Decoded]) -> Decoded:
    """Concatenates batches."""
    return Decoded(
        [name for batch in batches for name in batch.ids],
        np.concatenate([batch.good for batch in batches]),
        np.concatenate([batch.pixels for batch in batches]),
        np.concatenate([batch.sizes for batch in batches]),
        [reject for batch in batches for reject in batch.rejects],
        [pa.concat_arrays(columns) for columns in zip(*(batch.kept for batch in batches), strict=True)],
    )


def decode_rows(
    rows: Rows, size: int, limits: Limits, run: Callable[..., Any] = map, jpeg: JpegMode = "full"
) -> Decoded:
    """Decodes a batch; a failure concerns one image only.

    Args:
        rows: The encoded images.
        size: Side of the decoded images in pixels.
        limits: Maximum number of bytes and pixels per image.
        run: A function like `map`, such as that of a thread pool, to decode images concurrently.
        jpeg: How JPEGs are decoded.
    """

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


def decode_plan(plan: Plan, size: int, batch_size: int) -> Iterator[Decoded]:
    """Decodes the images of an input lazily, in batches that do not cross shards.

    Args:
        plan: The input.
        size: Side of the decoded images in pixels.
        batch_size: Maximum number of images per batch.
    """
    limits = Limits()
    with ThreadPoolExecutor() as pool:
        for shard in plan.shards:
            for rows in read_batches(plan.source, shard, batch_size, limits.max_bytes, pool):
                yield decode_rows(rows, size, limits, pool.map)
