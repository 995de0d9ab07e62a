"""The files that an INPUT names, local or on an object store: in the order of their names, without holding them all."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from jobs.sources.records import InputError
from jobs.storage.path import StoragePath, parse_uri, split_options
from jobs.storage.retry import as_os_error, reason

Names = Iterator[bytes]
"""Relative to a root, sorted as bytes (names need not be UTF-8), without hidden ones."""


def list_files(uri: str) -> tuple[StoragePath, Names, bool]:
    """The files of a folder, at any depth, of a glob, or the one file that a path or URI names.

    Returns:
        Their root, their names, which are listed while they are taken, and whether INPUT is a folder.

    Raises:
        InputError: nothing is there, or it cannot be listed; for a folder inside, only when it is come to.
    """
    if not uri:  # which abspath takes for the working folder
        raise InputError("the input has no name; name a folder, a glob, a list or a Parquet file")
    if "://" in uri and not uri.startswith("file://"):
        return _list_remote(uri)
    if uri.startswith("file://"):
        uri = parse_uri(uri).path
    return _list_local(uri)


def _list_local(uri: str) -> tuple[StoragePath, Names, bool]:
    local = LocalFileSystem()
    path = os.path.abspath(uri)
    if os.path.isdir(path):
        return StoragePath(local, path), _walk(os.fsencode(path)), True
    if os.path.exists(path):
        folder, name = os.path.split(path)
        return StoragePath(local, folder), iter([os.fsencode(name)]), False
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
    return StoragePath(local, base), (name for name in names if accepts(os.fsdecode(name))), False


def _walk(
    root: bytes,
    enter: Callable[[bytes], bool] = lambda folder: True,
    below: bytes = b"",
    inside: frozenset[tuple[int, int]] = frozenset(),
) -> Names:
    """The files at any depth, through links to folders too, but not through a link to a folder that it lies in.

    Args:
        enter: whether a folder, named relative to the root, may hold any that are wanted.
    """
    folder = os.path.join(root, below)
    try:
        info = os.stat(folder)
        if (mark := (info.st_dev, info.st_ino)) in inside:
            return
        with os.scandir(folder) as found:
            entries = [
                (entry.name + b"/" if os.path.isdir(entry.path) else entry.name)
                if entry.is_symlink() or entry.is_dir()
                else entry.name
                for entry in found
                if not entry.name.startswith(b".")
            ]
    except OSError as error:
        raise InputError(f"{os.fsdecode(folder)!r} cannot be listed: {error.strerror}") from error
    for name in sorted(entries):  # a folder's with its slash: so all paths are in order, as object stores have them
        path = os.path.join(below, name)
        if not name.endswith(b"/"):
            yield path
        elif enter(path[:-1]):
            yield from _walk(root, enter, path[:-1], inside | {mark})


def _list_remote(uri: str) -> tuple[StoragePath, Names, bool]:
    bare, _ = split_options(uri)
    whole = parse_uri(uri)
    fs, path = whole.fs, whole.path
    try:
        with as_os_error():
            if glob.has_magic(path):
                parts = path.split("/")
                fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
                if not fixed:
                    raise InputError(f"{bare!r} has a pattern in place of its bucket; name the bucket")
                root, pattern = StoragePath(fs, "/".join(parts[:fixed])), "/".join(parts[fixed:])
                accepts = re.compile(glob_translate(pattern)).match
                start = pattern[: re.search(r"[*?\[]", pattern).start()]  # pyright: ignore[reportOptionalMemberAccess]
                return root, (n for n in _keys(bare, root, start) if accepts(n.decode())), False
            if "/" in path and _is_file(whole):
                folder, _, name = path.rpartition("/")
                return StoragePath(fs, folder), iter([name.encode()]), False
            names = _keys(bare, whole, "")
            if (first := next(names, None)) is None:
                raise InputError(f"{bare!r} does not exist")
    except FileNotFoundError as error:
        raise InputError(f"{bare!r} does not exist: {reason(error)}") from error
    except OSError as error:
        raise InputError(f"{bare!r} cannot be listed: {reason(error)}") from error

    def following() -> Names:
        yield first
        yield from names

    return whole, following(), True


def _is_file(where: StoragePath) -> bool:
    try:
        return where.fs.info(where.path)["type"] == "file"  # isfile would take an outage for no
    except FileNotFoundError:
        return False


def _keys(uri: str, root: StoragePath, start: str) -> Names:
    """The objects below a root whose names start so, page by page where the store allows it."""
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
    more: dict[str, str] = {}
    fs: Any = root.fs
    while True:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        for item in page.get("Contents", ()):
            yield f"{bucket}/{item['Key']}"
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}
