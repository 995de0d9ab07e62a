"""Any URI as a pyarrow filesystem, and writes that are whole or absent."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from alit.errors import AlitError


class StorageError(AlitError):
    """A place that cannot be used; the message says why."""


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
        """What the folder holds, sorted; nothing where it does not exist."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def read(self) -> bytes:
        with self.filesystem.open_input_stream(self.path) as file:
            return file.read()

    def write(self, data: bytes) -> None:
        """Writes a file, whole or not at all, over what was there."""
        if not self.local:  # an object appears when its upload completes, not before
            with self.filesystem.open_output_stream(self.path) as file:
                file.write(data)
            return
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

    def remove_folder(self) -> None:
        self.filesystem.delete_dir(self.path)


def place(uri: str) -> Place:
    """The place that a local path or a URI such as `s3://bucket/folder` names.

    Raises:
        StorageError: the scheme is unknown, or the URI malformed.
    """
    if "://" not in uri:
        return Place(pafs.LocalFileSystem(), os.path.abspath(uri))
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (OSError, ValueError) as error:
        raise StorageError(f"{uri!r} cannot be opened: {error}") from error
    return Place(filesystem, path.rstrip("/"))
