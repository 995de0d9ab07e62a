"""Any URI as a folder, local or on an object store (fsspec), and writes that are whole or absent."""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import unquote

import fsspec
import pyarrow.fs as pafs
from fsspec.implementations.local import LocalFileSystem

from jobs.storage.retry import StorageError, Unavailable, again, as_os_error, is_outage, reason
from jobs.storage.s3 import s3_filesystem


class Writable(Protocol):
    """What `StoragePath.open_write` gives."""

    def write(self, data: bytes | memoryview, /) -> object: ...


_UNFINISHED = re.compile(r"\..*\.[0-9a-f]{32}\.tmp")


_EVERYTHING = 1 << 62  # bytes, as the end of a range: without one, s3fs asks for a file's size first


@contextmanager
def _telling(where: StoragePath, cannot: str) -> Iterator[None]:
    try:
        with as_os_error():
            yield
    except OSError as error:
        kind = Unavailable if not where.local and is_outage(error) else StorageError
        raise kind(f"{where.path!r} cannot be {cannot}: {reason(error)}") from error


@dataclass(frozen=True, slots=True)
class StoragePath:
    """A folder or file: an fsspec filesystem and a path on it; picklable.

    Credentials are no part of it: every process looks them up where they usually are.
    """

    fs: fsspec.AbstractFileSystem
    path: str

    def __truediv__(self, name: str) -> StoragePath:
        return StoragePath(self.fs, f"{self.path}/{name}")

    def with_suffix(self, ending: str) -> StoragePath:
        """The place whose path ends with `ending` too."""
        return replace(self, path=self.path + ending)

    @property
    def local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The same filesystem for pyarrow and for Ray."""
        return pafs.LocalFileSystem() if self.local else pafs.PyFileSystem(pafs.FSSpecHandler(self.fs))

    def exists(self) -> bool:
        with _telling(self, "looked up"):
            return self.fs.exists(self.path)

    def names(self) -> list[str]:
        """What the folder holds, sorted, without the unfinished files of `write`; nothing where it does not exist.

        Raises:
            StorageError: it is no folder, or cannot be listed.
        """
        with _telling(self, "listed as a folder"):
            try:
                if self.local:
                    found = os.listdir(self.path)
                else:
                    found = [path.rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.path, detail=False)]
            except FileNotFoundError:
                return []
        return sorted(name for name in found if name and not _UNFINISHED.fullmatch(name))

    def read(self, most: int = _EVERYTHING) -> bytes:
        """A file's bytes, the first `most` of them at most, in one request.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        if self.local:
            with open(self.path, "rb") as file:
                return file.read() if most == _EVERYTHING else file.read(most)
        with as_os_error():
            (data,) = self.fs.cat_ranges([self.path], 0, most)
            return whole(data)

    @contextmanager
    def open_read(self) -> Iterator[io.BufferedReader]:
        """A file that can be sought in: itself where it is local, else a copy on disk."""
        if self.local:
            with open(self.path, "rb") as file:
                yield file
            return
        with tempfile.TemporaryFile() as copy:
            with as_os_error(), self.fs.open(self.path, "rb", block_size=32 << 20) as stream:
                shutil.copyfileobj(cast(io.BufferedReader, stream), copy, 32 << 20)
            copy.seek(0)
            yield cast(io.BufferedReader, copy)

    @again
    def write(self, data: bytes) -> None:
        """Writes a file, whole or not at all, over what was there.

        Raises:
            StorageError: no room, no permission, or no such place.
        """
        with self.open_write() as file:
            file.write(data)

    @contextmanager
    def open_write(self) -> Iterator[Writable]:
        """A file to be written piece by piece: it appears, whole, at the end of the `with`, over what was there.

        Where the `with` ends in an exception, nothing appears, and what was there before stays.

        Raises:
            StorageError: no room, no permission, or no such place.
        """
        with _telling(self, "written"), self._open_locally() if self.local else self._open_remotely() as file:
            yield file

    @contextmanager
    def _open_locally(self) -> Iterator[Writable]:
        final = Path(self.path)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _open_remotely(self) -> Iterator[Writable]:
        file: Any = self.fs.open(self.path, "wb")  # waits in memory, and is one PUT below the size of a block
        try:
            yield file
        except BaseException:
            with suppress(Exception):
                file.discard()
            file.closed = True  # or its end of life would write what there is
            raise
        size = file.tell()
        try:
            file.close()
        except FileNotFoundError:  # the answer to a first try was lost: the upload that it completed is gone
            file.closed = True
            if self.fs.info(self.path)["size"] != size:
                raise

    def remove_file(self) -> None:
        """Removes a file, if it is there.

        Raises:
            StorageError: it cannot be removed.
        """
        with _telling(self, "removed"), suppress(FileNotFoundError):
            self.fs.rm_file(self.path)

    def remove_unfinished(self) -> None:
        """Removes from a local folder what a killed process left of its `write`; nobody must be writing there."""
        if self.local and os.path.isdir(self.path):
            for name in os.listdir(self.path):
                if _UNFINISHED.fullmatch(name):
                    os.unlink(os.path.join(self.path, name))

    def remove_folder(self) -> None:
        """Removes a folder and all that it holds.

        Raises:
            StorageError: it cannot be removed.
        """
        with _telling(self, "removed"):
            if self.local:
                shutil.rmtree(self.path)
            else:
                self.fs.rm(self.path, recursive=True)


def whole(answer: bytes | BaseException) -> bytes:
    """One of the answers of `cat_ranges`, or the error that it is.

    Raises:
        OSError: it is an error.
    """
    if not isinstance(answer, BaseException):
        return answer
    if "range" in str(answer).lower() and "satisf" in str(answer).lower():  # no range of an empty object exists
        return b""
    with as_os_error():
        raise answer


def parse_uri(uri: str) -> StoragePath:
    """The place that a local path or a URI such as `s3://bucket/folder` names.

    An s3 URI may end with options: `?endpoint=http://host:9000&region=eu-west-1&profile=name&anonymous=true&timeout=30`
    (seconds without a byte).

    Raises:
        StorageError: the scheme is unknown, or the URI malformed or empty.
    """
    if not uri:  # which abspath takes for the working folder
        raise StorageError("a folder has no name; name one, such as tokens/ or s3://bucket/tokens")
    if "://" not in uri:
        return StoragePath(LocalFileSystem(), os.path.abspath(uri))
    bare, options = split_options(uri)
    scheme, _, path = bare.partition("://")
    if scheme == "file":
        return StoragePath(LocalFileSystem(), os.path.abspath(unquote(path)))
    if not path.strip("/"):
        raise StorageError(f"{bare!r} names no bucket or folder; write it as s3://bucket/folder")
    if scheme in ("s3", "s3a"):
        return StoragePath(s3_filesystem(bare, options), path.rstrip("/"))
    if scheme in ("http", "https"):
        raise StorageError(f"{bare!r} is no folder; of the web, only single images are read, named in a list")
    try:
        return StoragePath(fsspec.filesystem(scheme), path.rstrip("/"))
    except (ImportError, TypeError, ValueError) as error:  # TypeError: a filesystem that needs arguments
        raise StorageError(f"{bare!r} cannot be opened: {reason(error)}") from error


def split_options(uri: str) -> tuple[str, dict[str, str]]:
    """A URI without the options at its end, and these."""
    bare, mark, query = uri.rpartition("?")
    if not mark or not all(re.fullmatch(r"\w+=[^=]*", part) for part in query.split("&")):
        return uri, {}  # a question mark of a glob
    return bare, {name: unquote(value) for name, _, value in (part.partition("=") for part in query.split("&"))}


def require_regular(info: os.stat_result) -> None:
    """Refuses pipes and devices, which may never end.

    Raises:
        OSError: it is one.
    """
    if not stat.S_ISREG(info.st_mode):
        raise OSError("it is not a regular file")
