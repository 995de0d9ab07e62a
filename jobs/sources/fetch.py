"""Fetches the bytes of single images by path or URI, many at once: from disks, object stores and the web.

A failure that concerns one image becomes its error. Storage errors are retried with backoff for 5 minutes and then
raised: an image must not count as unreadable because the network was down.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any
from urllib.parse import unquote_to_bytes

import urllib3

from jobs.sources.records import ImageBytes, readable
from jobs.storage.path import StoragePath, parse_uri, require_regular
from jobs.storage.retry import (
    StorageError,
    UnavailableError,
    as_os_error,
    is_outage,
    range_result,
    reason,
    retry_while_unavailable,
)
from jobs.storage.s3 import CONNECTIONS

_CREDENTIAL_WORDS = ("expired", "access key id", "signature", "token", "credentials")


WEB_TIMEOUT = urllib3.Timeout(connect=10, read=30)


WEB_HEADERS = {"User-Agent": "alit"}


WEB_RETRIES = urllib3.Retry(
    total=4, redirect=5, backoff_factor=0.5, backoff_jitter=0.5, status_forcelist=(429, 500, 502, 503, 504)
)


def raise_if_unavailable(root: StoragePath, name: bytes, error: OSError) -> None:
    """Raises `UnavailableError` if reading a file failed because its object store is unavailable.

    Args:
        root: The folder of the file.
        name: The file's name, for the message.
        error: The failure.

    Raises:
        UnavailableError: the failure is an outage.
    """
    if not root.local and is_outage(error):
        raise UnavailableError(f"{readable(name)!r} cannot be read: {reason(error)}") from error


def fetch(root: StoragePath, links: Sequence[bytes], max_bytes: int, pool: Executor) -> list[ImageBytes]:
    """Reads images in the given order; of each up to `max_bytes + 1` bytes, so that decoding rejects larger ones.

    Args:
        root: The folder that relative paths are relative to.
        links: Paths below the root, absolute paths, or URIs: file, http, https, and those of object stores.
        max_bytes: Maximum number of bytes per image.
        pool: Executor for local files and web servers; object stores are read concurrently by their own clients.

    Raises:
        UnavailableError: an object store was unavailable for `jobs.storage.retry.RETRY_SECONDS`.
        StorageError: an object store does not accept the credentials.
    """
    images: list[ImageBytes | None] = [None] * len(links)
    objects: dict[Any, list[tuple[int, str]]] = {}  # by filesystem
    others: list[tuple[int, Callable[[], ImageBytes]]] = []
    for i, link in enumerate(links):
        scheme = link.partition(b"://")[0].lower() if b"://" in link else b""
        if not link:
            images[i] = ImageBytes(None, "there is no path")
        elif scheme in (b"http", b"https"):
            others.append((i, lambda link=link: _fetch_web(link, max_bytes)))
        elif scheme and scheme != b"file":
            try:
                fs, path = _resolve(root, link.decode())
                objects.setdefault(fs, []).append((i, path))
            except (StorageError, UnicodeDecodeError) as error:
                images[i] = ImageBytes(None, reason(error))
        elif root.local or scheme or os.path.isabs(link):
            path = unquote_to_bytes(link[len(b"file://") :]) if scheme else os.path.join(os.fsencode(root.path), link)
            others.append((i, lambda path=path: _fetch_local(path, max_bytes)))
        else:
            objects.setdefault(root.fs, []).append((i, f"{root.path}/{link.decode('utf-8', 'replace')}"))
    running = pool.map(lambda item: item[1](), others)
    for fs, items in objects.items():
        for (i, _), image in zip(items, _fetch_objects(fs, [path for _, path in items], max_bytes), strict=True):
            images[i] = image
    for (i, _), image in zip(others, running, strict=True):
        images[i] = image
    return [image for image in images if image is not None]


def _resolve(root: StoragePath, uri: str) -> tuple[Any, str]:
    """Returns the filesystem and path of a URI; the root's own filesystem, with its options, where the schemes agree.

    Raises:
        StorageError: the URI is malformed, or its scheme unknown.
    """
    scheme, _, path = uri.partition("://")
    scheme, uri = scheme.lower(), f"{scheme.lower()}://{path}"
    if scheme in ("s3", "s3a") and not path.strip("/").count("/"):
        raise StorageError(f"{uri!r} does not name an object; write it as s3://bucket/folder/name.jpg")
    if "?" not in uri and not root.local and scheme in (root.fs.protocol, *root.fs.protocol):
        return root.fs, path
    parsed = parse_uri(uri)
    return parsed.fs, parsed.path


def _fetch_local(path: bytes, max_bytes: int) -> ImageBytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # opening a pipe could block forever
            require_regular(os.fstat(file.fileno()))
            return ImageBytes(file.read(max_bytes + 1), None)
    except (OSError, ValueError) as error:  # ValueError: the name contains a zero byte
        return ImageBytes(None, f"the file cannot be read: {reason(error)}")


def _fetch_objects(fs: Any, paths: list[str], max_bytes: int) -> list[ImageBytes]:
    """Reads objects of one store, each in one request."""
    images: dict[int, ImageBytes] = {}

    @retry_while_unavailable
    def request_missing() -> None:
        outage: UnavailableError | None = None
        missing = [i for i in range(len(paths)) if i not in images]
        with as_os_error():
            results = fs.cat_ranges([paths[i] for i in missing], 0, max_bytes + 1, batch_size=CONNECTIONS)
        for i, result in zip(missing, results, strict=True):
            try:
                images[i] = ImageBytes(range_result(result), None)
            except OSError as error:
                if is_outage(error):
                    outage = UnavailableError(f"{paths[i]!r} cannot be read: {reason(error)}")
                elif isinstance(error, PermissionError) and any(w in str(error).lower() for w in _CREDENTIAL_WORDS):
                    raise StorageError(f"{paths[i]!r} cannot be read: {reason(error)}") from error
                else:
                    images[i] = ImageBytes(None, f"the file cannot be read: {reason(error)}")
        if outage is not None:
            raise outage

    request_missing()
    return [images[i] for i in range(len(paths))]


def _fetch_web(uri: bytes, max_bytes: int) -> ImageBytes:
    """Reads an image from a web server; failures are the image's, since of many servers some are always down."""
    try:
        for attempt in range(3):
            response = urllib3.request(
                "GET",
                uri.decode(),
                preload_content=False,
                timeout=WEB_TIMEOUT,
                retries=WEB_RETRIES,
                headers=WEB_HEADERS,
            )
            try:
                if response.status != 200:
                    status = f"{response.status} {response.reason or ''}".rstrip()
                    return ImageBytes(None, f"the web server answers {status}")
                return ImageBytes(response.read(max_bytes + 1), None)
            except (urllib3.exceptions.ProtocolError, urllib3.exceptions.ReadTimeoutError):
                if attempt == 2:
                    raise
            finally:
                response.drain_conn() if response.length_remaining in (None, 0) else response.close()
                response.release_conn()
        raise AssertionError
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        return ImageBytes(None, f"the web server cannot be read: {_web_error(error)}")


def _web_error(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error
    return f"{type(cause).__name__}: {reason(cause)}" if isinstance(cause, Exception) else str(cause)
