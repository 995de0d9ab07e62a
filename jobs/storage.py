"""Any URI as a pyarrow filesystem, and writes that are whole or absent."""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from alit.errors import AlitError


class StorageError(AlitError):
    """A place that cannot be used; the message says why."""


_UNFINISHED = re.compile(r"\..*\.[0-9a-f]{32}\.tmp")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


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

    def write(self, data: bytes) -> None:
        """Writes a file, whole or not at all, over what was there.

        Raises:
            StorageError: no room, no permission, or no such place.
        """
        try:
            if self.local:
                self._write_locally(data)
            else:  # an object appears when its upload completes, not before
                with self.filesystem.open_output_stream(self.path) as file:
                    file.write(data)
        except OSError as error:
            raise StorageError(f"{self.path!r} cannot be written: {_reason(error)}") from error

    def _write_locally(self, data: bytes) -> None:
        final = Path(self.path)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)
        finally:
            temporary.unlink(missing_ok=True)

    def remove_unfinished(self) -> None:
        """Removes from a local folder what a killed process left of its `write`; nobody must be writing there."""
        if self.local and os.path.isdir(self.path):
            for name in os.listdir(self.path):
                if _UNFINISHED.fullmatch(name):
                    os.unlink(os.path.join(self.path, name))

    def remove_folder(self) -> None:
        self.filesystem.delete_dir(self.path)


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
