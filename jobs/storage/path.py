"""Paths of files and folders, local or on an object store (fsspec), with atomic writes."""

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
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.implementations.local import LocalFileSystem

from jobs.storage.retry import (
    StorageError,
    UnavailableError,
    as_os_error,
    is_outage,
    range_result,
    reason,
    retry_while_unavailable,
)
from jobs.storage.s3 import s3_filesystem


class Writable(Protocol):
    """The file that `StoragePath.open_write` yields."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Appends bytes to the file."""
        ...


_UNFINISHED = re.compile(r"\..*\.[0-9a-f]{32}\.tmp")


_WHOLE_FILE = 1 << 62  # bytes, as the end of a range: without one, s3fs requests the size of a file first


_COPY_BLOCK = 32 << 20
"""Bytes per request while an object is copied to a local file."""


@contextmanager
def _translate_errors(path: StoragePath, action: str) -> Iterator[None]:
    """Converts storage errors to `StorageError`, with the path and the action, such as "written", in the message."""
    try:
        with as_os_error():
            yield
    except OSError as error:
        kind = UnavailableError if not path.local and is_outage(error) else StorageError
        raise kind(f"{path.path!r} cannot be {action}: {reason(error)}") from error


@dataclass(frozen=True, slots=True)
class StoragePath:
    """A folder or file: an fsspec filesystem and a path on it; picklable.

    Credentials are not part of it: every process finds them in the standard places.
    """

    fs: fsspec.AbstractFileSystem
    path: str

    def __truediv__(self, name: str) -> StoragePath:
        return StoragePath(self.fs, f"{self.path}/{name}")

    def with_suffix(self, ending: str) -> StoragePath:
        """Returns the path with `ending` appended."""
        return replace(self, path=self.path + ending)

    @property
    def local(self) -> bool:
        """Whether the path is on this machine's filesystem."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The same filesystem for pyarrow and for Ray."""
        return pafs.LocalFileSystem() if self.local else pafs.PyFileSystem(pafs.FSSpecHandler(self.fs))

    def exists(self) -> bool:
        """Returns whether there is a file or folder at the path.

        Raises:
            StorageError: the storage does not answer, or refuses.
        """
        with _translate_errors(self, "looked up"):
            return self.fs.exists(self.path)

    def names(self) -> list[str]:
        """Returns the sorted names in the folder, without unfinished files of `write`; [] if it does not exist.

        Raises:
            StorageError: the path is not a folder, or cannot be listed.
        """
        with _translate_errors(self, "listed as a folder"):
            try:
                if self.local:
                    names = os.listdir(self.path)
                else:
                    names = [path.rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.path, detail=False)]
            except FileNotFoundError:
                return []
        return sorted(name for name in names if name and not _UNFINISHED.fullmatch(name))

    def file_path(self, name: bytes | None = None) -> bytes | str:
        """Returns the path of a file below this folder, or of this file itself without a name.

        Args:
            name: A relative path as bytes, since names of local files need not be UTF-8.
        """
        if name is None:
            return self.path
        return os.path.join(os.fsencode(self.path), name) if self.local else f"{self.path}/{name.decode()}"

    def open_stream(self, name: bytes | None = None, *, block_size: int | None = None) -> BinaryIO:
        """Opens a file, local or on an object store, for reading.

        Args:
            name: A path below this folder, see `file_path`; this file itself when None.
            block_size: Bytes per request to an object store, read ahead of their use; None for requests of exactly
                the bytes that are read.

        Raises:
            OSError: the file does not exist, or cannot be read.
        """
        path = self.file_path(name)
        if self.local:
            return open(path, "rb")
        options = {"cache_type": "none"} if block_size is None else {"block_size": block_size}
        return cast(BinaryIO, self.fs.open(path, "rb", **options))

    def open_arrow(self, name: bytes, *, block_size: int | None = None) -> pa.NativeFile:
        """Opens a file as `open_stream` does, for pyarrow, which reads local files without holding Python's lock.

        Args:
            name: A path below this folder, see `file_path`.
            block_size: Bytes per request to an object store, see `open_stream`.

        Raises:
            OSError: the file does not exist, or cannot be read.
        """
        if self.local:
            return pa.OSFile(self.file_path(name), "rb")
        return pa.PythonFile(self.open_stream(name, block_size=block_size), mode="r")

    @contextmanager
    def open_seekable(self) -> Iterator[io.BufferedReader]:
        """Opens a file that is read in any order: the file itself if it is local, else a temporary local copy.

        Raises:
            OSError: the file does not exist, or cannot be read.
        """
        if self.local:
            with open(self.path, "rb") as file:
                yield file
            return
        with tempfile.TemporaryFile() as copy:
            with as_os_error(), self.open_stream(block_size=_COPY_BLOCK) as stream:
                shutil.copyfileobj(stream, copy, _COPY_BLOCK)
            copy.seek(0)
            yield cast(io.BufferedReader, copy)

    def read(self, limit: int = _WHOLE_FILE) -> bytes:
        """Returns a file's first `limit` bytes, all by default, in one request.

        Raises:
            OSError: the file does not exist, or cannot be read.
        """
        if self.local:
            with open(self.path, "rb") as file:
                return file.read() if limit == _WHOLE_FILE else file.read(limit)
        with as_os_error():
            (result,) = self.fs.cat_ranges([self.path], 0, limit)
            return range_result(result)

    @retry_while_unavailable
    def write(self, data: bytes) -> None:
        """Writes a file atomically, replacing an existing one.

        Raises:
            StorageError: there is no space or no permission, or the path is not valid.
        """
        with self.open_write() as file:
            file.write(data)

    @contextmanager
    def open_write(self) -> Iterator[Writable]:
        """Opens a file to be written piece by piece; it replaces an existing one, atomically, when the `with` ends.

        If the `with` ends in an exception, an existing file stays as it was.

        Raises:
            StorageError: there is no space or no permission, or the path is not valid.
        """
        with _translate_errors(self, "written"), self._open_locally() if self.local else self._open_remotely() as file:
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
        file: Any = self.fs.open(self.path, "wb")  # buffered in memory; one PUT if smaller than a block
        try:
            yield file
        except BaseException:
            with suppress(Exception):
                file.discard()
            file.closed = True  # or its finalizer would upload what was written so far
            raise
        size = file.tell()
        try:
            file.close()
        except FileNotFoundError:  # the first attempt completed the upload, but its response was lost
            file.closed = True
            if self.fs.info(self.path)["size"] != size:
                raise

    def remove_file(self) -> None:
        """Removes a file if it exists.

        Raises:
            StorageError: the file cannot be removed.
        """
        with _translate_errors(self, "removed"), suppress(FileNotFoundError):
            self.fs.rm_file(self.path)

    def remove_unfinished(self) -> None:
        """Removes the temporary files that killed processes left in a local folder; no process may be writing there."""
        if self.local and os.path.isdir(self.path):
            for name in os.listdir(self.path):
                if _UNFINISHED.fullmatch(name):
                    os.unlink(os.path.join(self.path, name))

    def remove_folder(self) -> None:
        """Removes a folder and its contents.

        Raises:
            StorageError: the folder cannot be removed.
        """
        with _translate_errors(self, "removed"):
            if self.local:
                shutil.rmtree(self.path)
            else:
                self.fs.rm(self.path, recursive=True)


def parse_uri(uri: str) -> StoragePath:
    """Parses a local path or a URI such as `s3://bucket/folder`.

    An s3 URI may end with options: `?endpoint=http://host:9000&region=eu-west-1&profile=name&anonymous=true&timeout=30`
    (seconds without a byte).

    Raises:
        StorageError: the scheme is unknown, or the URI is malformed or empty.
    """
    if not uri:  # abspath would return the working folder
        raise StorageError("the path is empty; name a folder such as tokens/ or s3://bucket/tokens")
    if "://" not in uri:
        return StoragePath(LocalFileSystem(), os.path.abspath(uri))
    bare, options = split_options(uri)
    scheme, _, path = bare.partition("://")
    if scheme == "file":
        return StoragePath(LocalFileSystem(), os.path.abspath(unquote(path)))
    if not path.strip("/"):
        raise StorageError(f"{bare!r} does not name a bucket or folder; write it as s3://bucket/folder")
    if scheme in ("s3", "s3a"):
        return StoragePath(s3_filesystem(bare, options), path.rstrip("/"))
    if scheme in ("http", "https"):
        raise StorageError(f"{bare!r} is not a folder; from the web, only single images named in a list are read")
    try:
        return StoragePath(fsspec.filesystem(scheme), path.rstrip("/"))
    except (ImportError, TypeError, ValueError) as error:  # TypeError: the filesystem requires arguments
        raise StorageError(f"{bare!r} cannot be opened: {reason(error)}") from error


def split_options(uri: str) -> tuple[str, dict[str, str]]:
    """Splits a URI into the URI without the options at its end, and these options."""
    bare, mark, query = uri.rpartition("?")
    if not mark or not all(re.fullmatch(r"\w+=[^=]*", part) for part in query.split("&")):
        return uri, {}  # the question mark belongs to a glob
    return bare, {name: unquote(value) for name, _, value in (part.partition("=") for part in query.split("&"))}


def require_regular(info: os.stat_result) -> None:
    """Refuses pipes and devices, which may never end.

    Raises:
        OSError: the file is not a regular one.
    """
    if not stat.S_ISREG(info.st_mode):
        raise OSError("it is not a regular file")
