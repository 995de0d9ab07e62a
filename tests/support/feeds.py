"""Training feeds of small images, and comparisons of their batches."""

from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from alit.training.trainer import TrainingBatch
from jobs.training.feed import Feed, make_feed

SIZE = 8


def folder_of(path: Path, images: list[bytes]) -> Path:
    """Writes images as files of a new folder."""
    path.mkdir()
    for number, data in enumerate(images):
        (path / f"{number:03}.png").write_bytes(data)
    return path


def table_of(path: Path, images: list[bytes | None], rows: int = 9) -> Path:
    """Writes images as Parquet tables, in row groups of 2."""
    path.mkdir()
    for start in range(0, len(images), rows):
        table = pa.table({"image": pa.array(images[start : start + rows], pa.binary())})
        pq.write_table(table, path / f"{start:03}.parquet", row_group_size=2)
    return path


def feed_of(source: Path | str, batch_size: int = 4, seed: int = 3, **options: object) -> Feed:
    """Returns a feed of small batches."""
    return make_feed(str(source), size=SIZE, batch_size=batch_size, seed=seed, **options)


def same(one: TrainingBatch, other: TrainingBatch) -> bool:
    """Returns whether two batches are equal."""
    return torch.equal(one.images, other.images) and one[1:] == other[1:]


def assert_same(some: list[TrainingBatch], others: list[TrainingBatch]) -> None:
    """Asserts that two lists of batches are equal."""
    assert len(some) == len(others)
    assert all(map(same, some, others))


def joined(shares: tuple[TrainingBatch, ...]) -> TrainingBatch:
    """Returns the batch of several workers' shares, in the order of their ranks."""
    images = torch.cat([share.images for share in shares])
    ids, rejects = (list(chain.from_iterable(lists)) for lists in zip(*(share[1:] for share in shares), strict=True))
    return TrainingBatch(images, ids, rejects)
