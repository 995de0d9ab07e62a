"""The types that every input format shares: format, source, shard, rows.

A shard is a fixed slice of the listed input and the unit of all work: one token file, one reject file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import pyarrow as pa

from alit.errors import AlitError
from jobs.storage.path import StoragePath


class InputError(AlitError):
    """An input that cannot be tokenized as requested; the message gives the reason."""


Kind = Literal["files", "links", "table", "tar"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A slice of the input.

    Attributes:
        number: The shard's index, after which its files are named.
        ids: The ids of its images, in order; empty for tables and tars, whose ids are read with the images.
        paths: The paths of its image files, one per id, as bytes since names need not be UTF-8; or its table or tar.
        start: The first row of the slice of a table.
        rows: The number of images; 0 for a tar, where it is not known in advance.
        kept: The kept columns of a list, under their names in the output.
    """

    number: int
    ids: tuple[str, ...] = ()
    paths: tuple[bytes, ...]
    start: int = 0
    rows: int
    kept: pa.Table | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the input is and how its shards are read; small and picklable, every worker has a copy.

    Attributes:
        root: The folder that all paths are relative to, except absolute ones in a list.
        kind: Image files below the root; links that a list holds; slices of tables (Parquet, Arrow); tars.
        image_column: The image column of tables and lists; for tars the extension of the images, "image" for any.
        id_column: The id column of tables and lists; None to build ids from the name of the file and the row.
        links: Whether the table's image column holds paths or URIs instead of bytes.
        keep: The columns to carry through, under their names in the input.
        kept: The same columns under their names in the output.
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
        """Whether shards are slices of files, so that neighbouring images are best read together."""
        return self.kind == "table"


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """An opened input: how to read it, and its shards, which are listed while they are consumed.

    Attributes:
        source: How the shards are read.
        shards: The shards, in order.
        files: The number of tables, lists or tars; None for image files, which have not been listed yet.
        columns: The columns of the first table or list.
    """

    source: Source
    shards: Iterator[Shard]
    files: int | None = None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A complete input in memory: every image is in exactly one shard."""

    source: Source
    shards: tuple[Shard, ...]

    @property
    def images(self) -> int:
        """The number of images in all shards."""
        return sum(shard.rows for shard in self.shards)


class Row(NamedTuple):
    """One image of the input: its file, and its row if the file is a table."""

    path: bytes
    number: int


class ImageBytes(NamedTuple):
    """The encoded bytes of one image, or the reason why they could not be read."""

    data: bytes | None
    error: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The encoded bytes of several images.

    Attributes:
        ids: The ids of the images.
        data: The bytes of each image, None where reading failed.
        errors: The reason of each failure, None where reading succeeded.
        kept: The kept columns, one value per image each.
    """

    ids: list[str]
    data: list[bytes | None]
    errors: list[str | None]
    kept: list[pa.Array] = field(default_factory=list)

    def slices(self, size: int) -> Iterator[Rows]:
        """Splits the rows into groups of at most `size`."""
        for start in range(0, len(self.ids), size):
            stop = start + size
            kept = [column.slice(start, size) for column in self.kept]
            yield Rows(ids=self.ids[start:stop], data=self.data[start:stop], errors=self.errors[start:stop], kept=kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """An input format: which files it recognizes, how it cuts them into shards, and how it reads these.

    Attributes:
        kind: The value of `Source.kind` for the format's shards.
        description: The files that the format recognizes, for error messages.
        extensions: Endings of its files' names, in lower case.
        in_folders: Whether folders are searched for its files; otherwise INPUT must be such a file, or a glob.
        open: Cuts files into shards. Called with INPUT as the user wrote it, a source whose `kind`, `links` and `kept`
            are not set yet, the files' names in the order of the listing, and the maximum number of rows per shard.
        read: Yields the rows of a shard in batches. Called with the source, the shard, the batch size, the maximum
            number of bytes per image, and an executor for concurrent reads. An image that cannot be read becomes a row
            with an error.
        read_rows: Reads single rows in the given order, without kept columns. Called with the source, the rows, the
            maximum number of bytes per image, and an executor. None if files can only be read from front to back.
    """

    kind: Kind
    description: str
    extensions: tuple[bytes, ...]
    in_folders: bool = True
    open: Callable[[str, Source, Iterable[bytes], int], Input]
    read: Callable[[Source, Shard, int, int, Executor], Iterator[Rows]]
    read_rows: Callable[[Source, Sequence[Row], int, Executor], Rows] | None = None

    def matches(self, name: bytes) -> bool:
        """Returns whether a file is of this format, by the extension of its name."""
        return name.rpartition(b"/")[2].lstrip(b".").lower().endswith(self.extensions)


_ESCAPES = {0xDC00 + byte: f"%{byte:02X}" for byte in range(0x80, 0x100)}


def readable(name: bytes) -> str:
    """Returns a name as text; if it is not UTF-8, its invalid bytes and `%` itself are escaped as `%XX`."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.replace(b"%", b"%25").decode("utf-8", "surrogateescape").translate(_ESCAPES)


def require_distinct(names: Iterable[bytes]) -> list[bytes]:
    """Returns the names of files as a list, after checking that they differ as text too.

    Raises:
        InputError: two names have the same readable form.
    """
    names, labels = list(names), dict[str, bytes]()
    for name in names:
        if labels.setdefault(readable(name), name) != name:
            raise InputError(f"two files are both called {readable(name)!r} where names must be UTF-8; rename one")
    return names


def make_rows(ids: Sequence[str], images: Sequence[ImageBytes], kept: list[pa.Array] | None = None) -> Rows:
    """Builds `Rows` from one id and one result of reading per image, and the kept columns."""
    data, errors = [image.data for image in images], [image.error for image in images]
    return Rows(ids=list(ids), data=data, errors=errors, kept=kept or [])
