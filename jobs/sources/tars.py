"""WebDataset tars: a shard each, read from front to back."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

import pyarrow as pa

from alit.images.formats import EXTENSIONS
from jobs.sources.fetch import raise_if_unavailable
from jobs.sources.kept import kept_fields
from jobs.sources.records import Bytes, Input, InputError, Rows, Shard, Source, make_rows, readable, require_distinct
from jobs.storage.retry import as_os_error, reason

TARS = (".tar", ".tar.gz", ".tgz")


def open_tars(source: Source, names: list[bytes]) -> Input:
    if source.id_column:
        raise InputError("--id-column needs a table or a list; the images of a tar are named after it and themselves")
    require_distinct(names)
    kept = kept_fields(pa.field(name, pa.string()) for name in source.keep)
    shards = (Shard(number=i, paths=(name,), rows=0) for i, name in enumerate(names))
    return Input(source=replace(source, kind="tar", kept=kept), shards=shards, files=len(names))


class _Header(tarfile.TarInfo):
    """Raises at a damaged header, where tarfile would take it for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # pyright: ignore[reportAttributeAccessIssue]
            raise tarfile.ReadError(f"a damaged header: {error}") from error


def read_tar(source: Source, shard: Shard, size: int, max_bytes: int) -> Iterator[Rows]:
    """The samples of a tar, from front to back: files that follow each other and differ in their extensions alone."""
    label = readable(shard.paths[0])
    ids: list[str] = []
    answers: list[Bytes] = []
    kept: list[list[str | None]] = []
    seen: dict[str, int] = {}
    problem = None
    samples = _samples(source, shard.paths[0], max_bytes)
    while True:
        try:
            sample = next(samples, None)
        except (tarfile.TarError, EOFError, OSError) as error:
            if isinstance(error, OSError):
                raise_if_unavailable(source, shard.paths[0], error)
            problem = Bytes(None, f"the tar ends too early or is damaged: {reason(error)}")
            sample = None
        if sample is None:
            if problem is not None:
                ids.append(f"{label}#end")
                answers.append(problem)
                kept.append([None] * len(source.keep))
            if ids:
                yield make_rows(ids, answers, _strings(kept, len(source.keep)))
            return
        name, answer, texts = sample
        seen[name] = seen.get(name, 0) + 1
        ids.append(f"{label}/{name}" + (f"#{seen[name]}" if seen[name] > 1 else ""))
        answers.append(answer)
        kept.append(texts)
        if len(ids) == size:
            yield make_rows(ids, answers, _strings(kept, len(source.keep)))
            ids, answers, kept = [], [], []


def _strings(rows: list[list[str | None]], columns: int) -> list[pa.Array]:
    return [pa.array([row[i] for row in rows], pa.string()) for i in range(columns)]


def _samples(source: Source, path: bytes, max_bytes: int) -> Iterator[tuple[str, Bytes, list[str | None]]]:
    """Every sample's image's name, its bytes, and the texts to keep."""
    pictures = {extension[1:] for extension in EXTENSIONS}
    wanted = pictures if source.image_column == "image" else {source.image_column.lower()}
    with as_os_error(), _opened(source, path) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar:
        key: str | None = None
        image: tuple[str, Bytes] | None = None
        texts: dict[str, str] = {}
        others: list[str] = []

        def finished() -> Iterator[tuple[str, Bytes, list[str | None]]]:
            if key is not None:
                nothing = Bytes(None, f"there is no image beside {', '.join(others) or 'nothing'}")
                yield *(image or (key, nothing)), [texts.get(name) for name in source.keep]

        members, problem = iter(tar), None
        while True:
            try:
                if (member := next(members, None)) is None:
                    break
            except (tarfile.TarError, EOFError, OSError) as error:
                problem = error  # what came before it is whole
                break
            name = readable(os.fsencode(member.name))
            folder, _, base = name.rpartition("/")
            if not (member.isfile() or member.islnk()) or base.startswith("."):
                continue
            stem, _, extension = base.partition(".")
            here = f"{folder}/{stem}" if folder else stem
            picture = extension.lower() in wanted
            if here != key or (picture and image is not None):  # a second image is a sample of its own
                yield from finished()
                key, image, texts, others = here, None, {}, []
            if member.islnk():
                if picture:
                    image = name, Bytes(None, f"it is a link to {readable(os.fsencode(member.linkname))}")
                continue
            content: Any = tar.extractfile(member)
            if picture:
                image = name, Bytes(content.read(max_bytes + 1), None)
            elif extension in source.keep:
                texts[extension] = content.read(max_bytes).decode("utf-8", "replace")
            else:
                others.append(base)
        yield from finished()
        if problem is not None:
            raise problem
        if tar.fileobj is not None and tar.fileobj.tell() == tar.offset:  # nothing where tarfile looked for more
            raise EOFError("the mark of its end is missing")


def _opened(source: Source, path: bytes) -> Any:
    if source.root.local:
        return open(os.path.join(os.fsencode(source.root.path), path), "rb")
    return source.root.fs.open(f"{source.root.path}/{path.decode()}", "rb", block_size=16 << 20)
