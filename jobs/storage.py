"""Any URI as a pyarrow filesystem, and writes that are whole or absent."""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import pyarrow as pa
import pyarrow.fs as pafs

from alit.errors import AlitError


class StorageError(AlitError):
    """A place that cannot be used; the message says why."""


class Writable(Protocol):
    """What `Place.open_write` gives."""

    def write(self, data: bytes | memoryview, /) -> object: ...


_UNFINISHED = re.compile(r"\..*\.[0-9a-f]{32}\.tmp")
_WAITING = 64 << 20  # bytes


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


class _Upload:
    """Waits for the network, where pyarrow's stream would hold in memory all that was written and not sent yet."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream, self._waiting = stream, 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _WAITING):
            piece = view[start : start + _WAITING]
            self._stream.write(piece)
            self._waiting += len(piece)
            if self._waiting >= _WAITING:
                self._stream.flush()
                self._waiting = 0


@dataclass(frozen=True, slots=True)
class Place:
    """A folder on a filesystem: `filesystem` and the `path` that it understands; picklable."""

    filesystem: pafs.FileSystem
    path: str

    def __truediv__(self, name: str) -> Place:
        return Place(self.filesystem, f"{self.path}/{name}")

    @property
    def local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def exists(self) -> bool:
        return self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound

    def names(self) -> list[str]:
        """What the folder holds, sorted, without the unfinished files of `write`; nothing where it does not exist.

        Raises:
            StorageError: it is no folder, or cannot be listed.
        """
        try:
            found = self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        except OSError as error:
            raise StorageError(f"{self.path!r} cannot be listed as a folder: {_reason(error)}") from error
        return sorted(info.base_name for info in found if not _UNFINISHED.fullmatch(info.base_name))

    def read(self) -> bytes:
        with self.filesystem.open_input_stream(self.path) as file:
            return file.read()

    @contextmanager
    def open_read(self) -> Iterator[io.BufferedReader]:
        """A file that can be sought in: itself where it is local, else a copy on disk."""
        if self.local:
            with open(self.path, "rb") as file:
                yield file
            return
        with tempfile.TemporaryFile() as copy:
            with self.filesystem.open_input_stream(self.path) as stream:
                shutil.copyfileobj(stream, copy, 1 << 20)
            copy.seek(0)
            yield cast(io.BufferedReader, copy)

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

        Where the `with` ends in an exception, nothing appears. On an object store what was there before may then be
        lost, so what must survive a failure has to be written under a new name.

        Raises:
            StorageError: no room, no permission, or no such place.
        """
        try:
            with self._open_locally() if self.local else self._open_remotely() as file:
                yield file
        except OSError as error:
            raise StorageError(f"{self.path!r} cannot be written: {_reason(error)}") from error

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
        file = self.filesystem.open_output_stream(self.path)
        try:
            yield _Upload(file)
        except BaseException:
            # pyarrow cannot abandon an upload: closing it makes an object of the part that was written.
            with suppress(OSError):
                file.close()
                self._delete()
            raise
        file.close()  # an object appears when its upload completes, not before

    def remove_file(self) -> None:
        """Removes a file, if it is there.

        Raises:
            StorageError: it cannot be removed.
        """
        try:
            self._delete()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageError(f"{self.path!r} cannot be removed: {_reason(error)}") from error

    def _delete(self) -> None:
        if self.filesystem.type_name == "s3":
            _delete_object(self.filesystem, self.path)
        else:
            self.filesystem.delete_file(self.path)

    def remove_unfinished(self) -> None:
        """Removes from a local folder what a killed process left of its `write`; nobody must be writing there."""
        if self.local and os.path.isdir(self.path):
            for name in os.listdir(self.path):
                if _UNFINISHED.fullmatch(name):
                    os.unlink(os.path.join(self.path, name))

    def without_markers(self) -> Place:
        """The same place, through a filesystem that writes no objects for folders, which some servers refuse."""
        if not isinstance(self.filesystem, pafs.S3FileSystem):
            return self
        return Place(pafs.PyFileSystem(pafs.FSSpecHandler(_s3fs(self.filesystem))), self.path)

    def remove_folder(self) -> None:
        self.filesystem.delete_dir(self.path)


def _delete_object(filesystem: pafs.FileSystem, path: str) -> None:
    """As pyarrow's own `delete_file` also writes an empty object with the folder's name (apache/arrow#36275).

    That costs a request and a permission, and a server that keeps objects as files loses the folder over it.
    """
    client = _s3fs(filesystem)
    try:
        client.rm_file(path)
    except OSError:
        raise
    except Exception as error:  # of the network
        raise OSError(str(error)) from error


def _s3fs(filesystem: pafs.FileSystem) -> Any:
    """The same storage through s3fs."""
    import s3fs  # takes most of a second

    _, (options,) = filesystem.__reduce__()
    endpoint = options["endpoint_override"]
    return s3fs.S3FileSystem(
        anon=options["anonymous"],
        key=options["access_key"],
        secret=options["secret_key"],
        token=options["session_token"],
        endpoint_url=f"{options['scheme']}://{endpoint}" if endpoint else None,
        client_kwargs={"region_name": options["region"]},
    )


def place(uri: str) -> Place:
    """The place that a local path or a URI such as `s3://bucket/folder` names.

    Raises:
        StorageError: the scheme is unknown, or the URI malformed or empty.
    """
    if not uri:  # which abspath takes for the working folder
        raise StorageError("a folder has no name; name one, such as tokens/ or s3://bucket/tokens")
    if "://" not in uri:
        return Place(pafs.LocalFileSystem(), os.path.abspath(uri))
    if uri.startswith("s3://") and "allow_delayed_open" not in uri:
        uri += ("&" if "?" in uri else "?") + "allow_delayed_open=true"  # a small file is one PUT, not three requests
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (OSError, ValueError) as error:
        raise StorageError(f"{uri!r} cannot be opened: {error}") from error
    if not path.strip("/"):
        raise StorageError(f"{uri!r} names no bucket or folder; write it as s3://bucket/folder")
    return Place(filesystem, path.rstrip("/"))
