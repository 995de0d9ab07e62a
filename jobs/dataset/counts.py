"""Counts of one shard, as a worker reports them and as the footer of its token file stores them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from alit.dataset import DATA, Metadata
from jobs.storage.path import StoragePath
from jobs.storage.retry import as_os_error


def file_name(number: int) -> str:
    """The name of shard `number`'s files."""
    return f"{number:08d}.parquet"


class Counts(NamedTuple):
    """What a worker tells the driver: of a shard under way now and then, and once more when its files are written."""

    shard: int
    images: int
    rejects: int
    lengths: list[int]
    """How many images got each length."""
    satisfied: int
    seconds: float
    """Since the shard was started; 0 where another attempt had written it."""
    done: bool
    trouble: str = ""
    """The first reject, for a person."""

    def to_metadata(self) -> dict[bytes, bytes]:
        """For the token file, so that whoever goes on need not read its rows."""
        told = self._asdict()
        return {SHARD_KEY: json.dumps({name: told[name] for name in _KEPT_COUNTS}, sort_keys=True).encode()}


def tokens_of(lengths: Sequence[int], metadata: Metadata) -> int:
    """The tokens of images, of which so many got each length."""
    return sum(count * metadata.latents_per_iteration * (k + 1) for k, count in enumerate(lengths))


_KEPT_COUNTS = ("shard", "images", "rejects", "lengths", "satisfied")


SHARD_KEY = b"alit_shard"


def written_counts(output: StoragePath, number: int) -> Counts | None:
    """The counts of a shard that is written; None where it is not.

    Raises:
        OSError, pyarrow.ArrowException: the file is damaged or out of reach.
        KeyError, ValueError: it is none of ours.
    """
    where = output / DATA / file_name(number)
    try:
        with as_os_error():
            source = pa.OSFile(where.path) if where.local else pa.BufferReader(where.read())
            metadata = pq.ParquetFile(source).metadata.metadata or {}
    except FileNotFoundError:
        return None
    return Counts(**json.loads(metadata[SHARD_KEY]), seconds=0.0, done=True)
