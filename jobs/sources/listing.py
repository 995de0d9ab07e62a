"""Lists the files that an INPUT names, local or on an object store: in the order of their names, and lazily."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from jobs.sources.records import InputError
from jobs.storage.path import StoragePath, parse_uri, split_options
from jobs.storage.retry import as_os_error, reason

Names = Iterator[bytes]
"""Relative to a root, sorted as bytes (names need not be UTF-8), without hidden ones."""


class Listing(NamedTuple):
    """The files that an INPUT names."""

    root: StoragePath
    """The folder that the names are relative to."""
    names: Names
    """The names of the files, which are listed while they are consumed."""
    is_folder: bool
    """Whether INPUT is a folder, rather than a file or a glob."""


def list_files(uri: str) -> Listing:
    """Lists the files of a folder, at any depth, of a glob, or the one file that a path or URI names.

    Raises:
        InputError: the input does not exist or cannot be listed; if a folder inside it cannot be listed, only when the
            names reach it.
    """
    if not uri:  # abspath would return the working folder
        raise InputError("the input is empty; name a folder, a glob, a list or a Parquet file")
    if "://" in uri and not uri.startswith("file://"):
        return _list_remote(uri)
    if uri.startswith("file://"):
        uri = parse_uri(uri).path
    return _list_local(uri)


def _list_local(uri: str) -> Listing:
    local = LocalFileSystem()
    path = os.path.abspath(uri)
    if os.path.isdir(path):
        return Listing(StoragePath(local, path), _walk(os.fsencode(path)), True)
    if os.path.exists(path):
        folder, name = os.path.split(path)
        return Listing(StoragePath(local, folder), iter([os.fsencode(name)]), False)
    if not glob.has_magic(uri):
        raise InputError(f"{uri!r} does not exist")
    parts = Path(uri).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base, patterns = os.path.abspath(Path(*parts[:fixed])), parts[fixed:]
    accepts = re.compile(glob_translate("/".join(patterns))).match

    def enter(folder: bytes) -> bool:
        parts = os.fsdecode(folder).split("/")
        for part, pattern in zip(parts, patterns, strict=False):
            if "**" in pattern:
                return True
            if not fnmatchcase(part, pattern):
                return False
        return len(parts) < len(patterns)

    names = _walk(os.fsencode(base), enter)
    return Listing(StoragePath(local, base), (name for name in names if accepts(os.fsdecode(name))), False)


def _walk(
    root: bytes,
    enter: Callable[[bytes], bool] = lambda folder: True,
    below: bytes = b"",
    inside: frozenset[tuple[int, int]] = frozenset(),
) -> Names:
    """Yields files at any depth, including those in linked folders, except links to a folder that contains the link.

    Args:
        root: The folder.
        enter: Returns whether a folder, named relative to the root, may hold files of interest.
        below: The folder to list, relative to the root.
        inside: Device and inode of the folders that contain `below`.

    Raises:
        InputError: a folder cannot be listed.
    """
    folder = os.path.join(root, below)
    try:
        info = os.stat(folder)
        if (identity := (info.st_dev, info.st_ino)) in inside:
            return
        with os.scandir(folder) as entries:
            names = [
                (entry.name + b"/" if os.path.isdir(entry.path) else entry.name)
                if entry.is_symlink() or entry.is_dir()
                else entry.name
                for entry in entries
                if not entry.name.startswith(b".")
            ]
    except OSError as error:
        raise InputError(f"{os.fsdecode(folder)!r} cannot be listed: {error.strerror}") from error
    for name in sorted(names):  # folders with their slash: all paths are then in the order of object stores
        path = os.path.join(below, name)
        if not name.endswith(b"/"):
            yield path
        elif enter(path[:-1]):
            yield from _walk(root, enter, path[:-1], inside | {identity})


def _list_remote(uri: str) -> Listing:
    bare, _ = split_options(uri)
    folder = parse_uri(uri)
    fs, path = folder.fs, folder.path
    try:
        with as_os_error():
            if glob.has_magic(path):
                return _list_remote_glob(bare, folder)
            if "/" in path and _is_file(folder):
                parent, _, name = path.rpartition("/")
                return Listing(StoragePath(fs, parent), iter([name.encode()]), False)
            names = _keys(bare, folder, "")
            if (first := next(names, None)) is None:
                raise InputError(f"{bare!r} does not exist")
    except FileNotFoundError as error:
        raise InputError(f"{bare!r} does not exist: {reason(error)}") from error
    except OSError as error:
        raise InputError(f"{bare!r} cannot be listed: {reason(error)}") from error
    return Listing(folder, chain([first], names), True)


def _list_remote_glob(uri: str, path: StoragePath) -> Listing:
    parts = path.path.split("/")
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    if not fixed:
        raise InputError(f"{uri!r} has a pattern in place of its bucket; name the bucket")
    root, pattern = StoragePath(path.fs, "/".join(parts[:fixed])), "/".join(parts[fixed:])
    accepts = re.compile(glob_translate(pattern)).match
    start = pattern[: re.search(r"[*?\[]", pattern).start()]  # pyright: ignore[reportOptionalMemberAccess]
    return Listing(root, (name for name in _keys(uri, root, start) if accepts(name.decode())), False)


def _is_file(path: StoragePath) -> bool:
    try:
        return path.fs.info(path.path)["type"] == "file"  # isfile would return False during an outage
    except FileNotFoundError:
        return False


def _keys(uri: str, root: StoragePath, start: str) -> Names:
    """Yields the objects below a root whose names start with `start`, page by page where the store allows it.

    Raises:
        FileNotFoundError: the bucket does not exist.
        InputError: the objects cannot be listed.
    """
    prefix = f"{root.path}/"
    try:
        with as_os_error():
            for path in _pages(root, start) if hasattr(root.fs, "call_s3") else sorted(root.fs.find(root.path)):
                name = path.removeprefix(prefix)
                if not name.endswith("/") and not any(part.startswith(".") for part in name.split("/")):
                    yield name.encode()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{uri!r} cannot be listed: {reason(error)}") from error


def _pages(root: StoragePath, start: str) -> Iterator[str]:
    bucket, _, folder = root.path.partition("/")
    prefix = (f"{folder}/" if folder else "") + start
    continuation: dict[str, str] = {}
    fs: Any = root.fs
    while True:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **continuation)
        for item in page.get("Contents", ()):
            yield f"{bucket}/{item['Key']}"
        if not page.get("IsTruncated"):
            return
        continuation = {"ContinuationToken": page["NextContinuationToken"]}
