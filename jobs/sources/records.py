"""The types that every input format shares: source, shard, rows.

A shard is a fixed slice of the listed input, and the unit of all work: one token file, one reject file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import pyarrow as pa

from alit.errors import AlitError
from jobs.storage.path import StoragePath


class InputError(AlitError):
    """An input that cannot be tokenized as asked; the message says why."""


Kind = Literal["files", "links", "table", "tar"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A slice of the input.

    Attributes:
        number: names its files.
        ids: of its images, in order; empty for tables and tars, whose ids are read with the images.
        paths: of its image files, as bytes (names need not be UTF-8), one per id; or the one table or tar.
        start, rows: the slice of the table; `rows` is the number of images in either case, 0 for a tar: unknown.
        kept: the kept columns of a list, under their names in the output.
    """

    number: int
    ids: tuple[str, ...] = ()
    paths: tuple[bytes, ...]
    start: int = 0
    rows: int
    kept: pa.Table | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the input lies and how its shards are read; small and picklable, every worker has it.

    Attributes:
        root: the folder below which all paths lie, but for the links of a list that are absolute.
        kind: files below the root; links that a list gives; slices of tables (Parquet, Arrow); whole tars.
        image_column: of tables and lists; of tars the extension of the image's file, any image when "image".
        id_column: of tables and lists; made from the file's name and the row when None.
        links: whether the table's image column holds paths or URIs, in place of bytes.
        keep: the columns to carry through, under their names in the input.
        kept: the same under their names in the output.
    """

    root: StoragePath
    kind: Kind = "files"
    image_column: str = "image"
    id_column: str | None = None
    links: bool = False
    keep: tuple[str, ...] = ()
    kept: tuple[pa.Field, ...] = ()

    @property
    def sliced(self) -> bool:
        """Whether shards are slices of files: neighbouring images are read together."""
        return self.kind == "table"


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """What an INPUT names: how to read it, and its shards, which are listed while they are taken.

    Attributes:
        files: how many image files, tables, lists or tars hold it; of image files None, as they are not listed yet.
        columns: of its first table or list.
    """

    source: Source
    shards: Iterator[Shard]
    files: int | None = None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A whole input in memory: every image is in exactly one shard."""

    source: Source
    shards: tuple[Shard, ...]

    @property
    def images(self) -> int:
        return sum(shard.rows for shard in self.shards)


class Row(NamedTuple):
    """One image of the input: its file, and the row of it where that is a table."""

    path: bytes
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The bytes of some images; where reading failed, the data is None and the error says why."""

    ids: list[str]
    data: list[bytes | None]
    errors: list[str | None]
    kept: list[pa.Array] = field(default_factory=list)

    def slices(self, size: int) -> Iterator[Rows]:
        for start in range(0, len(self.ids), size):
            stop = start + size
            kept = [column.slice(start, size) for column in self.kept]
            yield Rows(ids=self.ids[start:stop], data=self.data[start:stop], errors=self.errors[start:stop], kept=kept)


def readable(name: bytes) -> str:
    """A name as text; bytes that are no UTF-8, and the escape character itself beside them, as `%XX`."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.replace(b"%", b"%25").decode("utf-8", "surrogateescape").translate(_ESCAPES)


_ESCAPES = {0xDC00 + byte: f"%{byte:02X}" for byte in range(0x80, 0x100)}


def require_distinct(names: Iterable[bytes]) -> None:
    labels: dict[str, bytes] = {}
    for name in names:
        if labels.setdefault(readable(name), name) != name:
            raise InputError(f"two files are both called {readable(name)!r} where names must be UTF-8; rename one")


def make_rows(ids: Sequence[str], answers: Sequence[Bytes], kept: list[pa.Array] | None = None) -> Rows:
    data, errors = [answer.data for answer in answers], [answer.error for answer in answers]
    return Rows(ids=list(ids), data=data, errors=errors, kept=kept or [])


class Bytes(NamedTuple):
    """One image's bytes, or why there are none."""

    data: bytes | None
    error: str | None
