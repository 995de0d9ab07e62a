"""WebDataset tars: each is one shard and is read from front to back."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import pyarrow as pa

from alit.images.formats import EXTENSIONS
from jobs.sources.fetch import raise_if_unavailable
from jobs.sources.kept import kept_fields
from jobs.sources.records import (
    Format,
    ImageBytes,
    Input,
    InputError,
    Rows,
    Shard,
    Source,
    make_rows,
    readable,
    require_distinct,
)
from jobs.storage.retry import as_os_error, reason

BLOCK_BYTES = 16 << 20
"""Bytes per request to an object store."""


_READ_ERRORS = (tarfile.TarError, EOFError, OSError)


def open_tars(uri: str, source: Source, names: Iterable[bytes], rows_per_file: int) -> Input:
    """Makes every tar a shard; see `Format.open`.

    Raises:
        InputError: an id column is requested, or two names have the same readable form.
    """
    if source.id_column:
        raise InputError("--id-column needs a table or a list; the images of a tar are named after it and themselves")
    names = require_distinct(names)
    kept = kept_fields(pa.field(name, pa.string()) for name in source.keep)
    shards = (Shard(number=i, paths=(name,), rows=0) for i, name in enumerate(names))
    return Input(source=replace(source, kind="tar", kept=kept), shards=shards, files=len(names))


class _Sample(NamedTuple):
    """An image and the texts that accompany it; without a name where the tar is damaged."""

    name: str | None
    image: ImageBytes
    texts: list[str | None]


def read_tar(source: Source, shard: Shard, batch_size: int, max_bytes: int, pool: Executor) -> Iterator[Rows]:
    """Yields the samples of a tar in batches, from front to back; see `Format.read`.

    Consecutive files whose names differ in the extension alone are one sample. A damaged tar gives the samples before
    the damage, and a row with an error.
    """
    (path,) = shard.paths
    label = readable(path)
    occurrences: dict[str, int] = {}
    ids: list[str] = []
    samples: list[_Sample] = []
    for sample in _samples_and_damage(source, path, max_bytes):
        if sample.name is None:
            ids.append(f"{label}#end")
        else:
            count = occurrences[sample.name] = occurrences.get(sample.name, 0) + 1
            ids.append(f"{label}/{sample.name}" + (f"#{count}" if count > 1 else ""))
        samples.append(sample)
        if len(ids) == batch_size:
            yield _rows(ids, samples, len(source.keep))
            ids, samples = [], []
    if ids:
        yield _rows(ids, samples, len(source.keep))


def _rows(ids: list[str], samples: list[_Sample], columns: int) -> Rows:
    kept = [pa.array([sample.texts[i] for sample in samples], pa.string()) for i in range(columns)]
    return make_rows(ids, [sample.image for sample in samples], kept)


def _samples_and_damage(source: Source, path: bytes, max_bytes: int) -> Iterator[_Sample]:
    """Yields the samples of a tar and, if it is damaged, one without a name that holds the error."""
    try:
        yield from _samples(source, path, max_bytes)
    except _READ_ERRORS as error:
        if isinstance(error, OSError):
            raise_if_unavailable(source.root, path, error)
        damage = ImageBytes(None, f"the tar ends too early or is damaged: {reason(error)}")
        yield _Sample(None, damage, [None] * len(source.keep))


class _Header(tarfile.TarInfo):
    """Raises at a damaged header, which tarfile would take for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # pyright: ignore[reportAttributeAccessIssue]
            raise tarfile.ReadError(f"a damaged header: {error}") from error


@dataclass(slots=True)
class _Group:
    """The files of one sample that were read so far.

    Attributes:
        key: The part of their names that they share.
        image: The image's name and bytes.
        texts: The texts to keep, by extension.
        others: The names of the other files.
    """

    key: str
    image: tuple[str, ImageBytes] | None = None
    texts: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def sample(self, keep: tuple[str, ...]) -> _Sample:
        name, image = self.image or (
            self.key,
            ImageBytes(None, f"there is no image beside {', '.join(self.others) or 'nothing'}"),
        )
        return _Sample(name, image, [self.texts.get(extension) for extension in keep])


def _samples(source: Source, path: bytes, max_bytes: int) -> Iterator[_Sample]:
    """Yields the samples of a tar.

    Raises:
        OSError, EOFError, tarfile.TarError: the tar is damaged; after the samples before the damage.
    """
    any_image = {extension[1:] for extension in EXTENSIONS}
    image_extensions = any_image if source.image_column == "image" else {source.image_column.lower()}
    with (
        as_os_error(),
        source.root.open_stream(path, block_size=BLOCK_BYTES) as file,
        tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar,
    ):
        group: _Group | None = None
        members, damage = iter(tar), None
        while True:
            try:
                if (member := next(members, None)) is None:
                    break
            except _READ_ERRORS as error:
                damage = error  # the sample before it is complete
                break
            name = readable(os.fsencode(member.name))
            folder, _, base = name.rpartition("/")
            if not (member.isfile() or member.islnk()) or base.startswith("."):
                continue
            stem, _, extension = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            is_image = extension.lower() in image_extensions
            if group is None or key != group.key or (is_image and group.image):  # a second image starts a sample
                if group is not None:
                    yield group.sample(source.keep)
                group = _Group(key)
            if member.islnk():
                if is_image:
                    target = readable(os.fsencode(member.linkname))
                    group.image = name, ImageBytes(None, f"it is a link to {target}")
                continue
            content: Any = tar.extractfile(member)
            if is_image:
                group.image = name, ImageBytes(content.read(max_bytes + 1), None)
            elif extension in source.keep:
                group.texts[extension] = content.read(max_bytes).decode("utf-8", "replace")
            else:
                group.others.append(base)
        if group is not None:
            yield group.sample(source.keep)
        if damage is not None:
            raise damage
        if tar.fileobj is not None and tar.fileobj.tell() == tar.offset:  # there was no header where one was expected
            raise EOFError("its end-of-archive marker is missing")


TARS = Format(
    kind="tar",
    description="tars",
    extensions=(b".tar", b".tar.gz", b".tgz"),
    open=open_tars,
    read=read_tar,
)
