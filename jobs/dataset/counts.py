"""Counts of one shard, as a worker reports them and as the footer of its token file stores them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from alit.dataset import DATA
from jobs.storage.path import StoragePath
from jobs.storage.retry import as_os_error

SHARD_KEY = b"alit_shard"
_STORED_FIELDS = ("shard", "images", "rejects", "lengths", "satisfied")


def file_name(number: int) -> str:
    """Returns the name of a shard's files."""
    return f"{number:08d}.parquet"


class Counts(NamedTuple):
    """Cumulative counts of one shard: reported while it is in progress, and once more when its files are written."""

    shard: int
    images: int
    rejects: int
    lengths: list[int]
    """Images per length, shortest first."""
    satisfied: int
    seconds: float
    """Time since the shard was started; 0 where an earlier attempt had written it."""
    done: bool
    first_reject: str = ""
    """The first rejected image and the reason, for messages."""

    def to_metadata(self) -> dict[bytes, bytes]:
        """Returns the token file's footer entry, which lets a resumed job skip reading the rows."""
        fields = self._asdict()
        return {SHARD_KEY: json.dumps({name: fields[name] for name in _STORED_FIELDS}, sort_keys=True).encode()}


def tokens_of(lengths: Sequence[int], latents_per_iteration: int) -> int:
    """Returns the total number of tokens.

    Args:
        lengths: Images per length, shortest first.
        latents_per_iteration: Tokens by which each length exceeds the one before.
    """
    return sum(count * latents_per_iteration * (k + 1) for k, count in enumerate(lengths))


def written_counts(output: StoragePath, number: int) -> Counts | None:
    """Reads the counts of a shard from the footer of its token file.

    Args:
        output: The dataset's folder.
        number: The shard.

    Returns:
        None where the file does not exist.

    Raises:
        OSError: The file is damaged or cannot be reached.
        pyarrow.ArrowException: The file is damaged.
        KeyError: The footer has no counts.
        ValueError: The footer's counts are malformed.
    """
    path = output / DATA / file_name(number)
    try:
        with as_os_error():
            source = pa.OSFile(path.path) if path.local else pa.BufferReader(path.read())
            metadata = pq.ParquetFile(source).metadata.metadata or {}
    except FileNotFoundError:
        return None
    return Counts(**json.loads(metadata[SHARD_KEY]), seconds=0.0, done=True)
