"""The bytes of single images by path or URI: from disks, object stores and the web, many at once.

What is wrong with one image becomes its error. What is wrong with the storage is tried again for minutes, and then
raised: an image must not count as unreadable because the network was down.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any
from urllib.parse import unquote_to_bytes

import urllib3

from jobs.sources.records import Bytes, Source, readable
from jobs.storage.path import StoragePath, parse_uri, require_regular, whole
from jobs.storage.retry import StorageError, Unavailable, again, as_os_error, is_outage, reason
from jobs.storage.s3 import CONNECTIONS


def raise_if_unavailable(source: Source, name: bytes, error: OSError) -> None:
    if not source.root.local and is_outage(error):
        raise Unavailable(f"{readable(name)!r} cannot be read: {reason(error)}") from error


_EXPIRED = ("expired", "access key id", "signature", "token", "credentials")


WEB = urllib3.Timeout(connect=10, read=30)


WEB_HEADERS = {"User-Agent": "alit"}


WEB_RETRIES = urllib3.Retry(
    total=4, redirect=5, backoff_factor=0.5, backoff_jitter=0.5, status_forcelist=(429, 500, 502, 503, 504)
)


def fetch(root: StoragePath, links: Sequence[bytes], max_bytes: int, pool: Executor) -> list[Bytes]:
    """The bytes of images, one more than `max_bytes` at most, so that decoding sees which are too large.

    Args:
        root: what relative paths are relative to.
        links: paths below the root, absolute paths, or URIs: file, s3 and other stores', http and https.
        max_bytes: of each.
        pool: reads what has no way of its own to read many at once.

    Raises:
        Unavailable: an object store did not answer for `jobs.storage.PATIENCE` seconds.
        StorageError: it does not accept the credentials.
    """
    answers: list[Bytes | None] = [None] * len(links)
    remote: dict[Any, list[tuple[int, str]]] = {}
    others: list[tuple[int, Callable[[], Bytes]]] = []
    for i, link in enumerate(links):
        scheme = link.partition(b"://")[0].lower() if b"://" in link else b""
        if not link:
            answers[i] = Bytes(None, "there is no path")
        elif scheme in (b"http", b"https"):
            others.append((i, lambda link=link: _web(link, max_bytes)))
        elif scheme and scheme != b"file":
            try:
                fs, path = _resolve(root, link.decode())
                remote.setdefault(fs, []).append((i, path))
            except (StorageError, UnicodeDecodeError) as error:
                answers[i] = Bytes(None, reason(error))
        elif root.local or scheme or os.path.isabs(link):
            path = unquote_to_bytes(link[len(b"file://") :]) if scheme else os.path.join(os.fsencode(root.path), link)
            others.append((i, lambda path=path: _local(path, max_bytes)))
        else:
            remote.setdefault(root.fs, []).append((i, f"{root.path}/{link.decode('utf-8', 'replace')}"))
    read = pool.map(lambda item: item[1](), others)
    for fs, wanted in remote.items():
        found = _objects(fs, [path for _, path in wanted], max_bytes)
        for (i, _), answer in zip(wanted, found, strict=True):
            answers[i] = answer
    for (i, _), answer in zip(others, read, strict=True):
        answers[i] = answer
    return [answer for answer in answers if answer is not None]


def _resolve(root: StoragePath, uri: str) -> tuple[Any, str]:
    """The filesystem and path of a URI; through the root's own filesystem, with its options, where it can."""
    scheme, _, path = uri.partition("://")
    scheme, uri = scheme.lower(), f"{scheme.lower()}://{path}"
    if scheme in ("s3", "s3a") and not path.strip("/").count("/"):
        raise StorageError(f"{uri!r} names no object; write it as s3://bucket/folder/name.jpg")
    if "?" not in uri and not root.local and scheme in (root.fs.protocol, *root.fs.protocol):
        return root.fs, path
    found = parse_uri(uri)
    return found.fs, found.path


def _local(path: bytes, max_bytes: int) -> Bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe would block until written
            require_regular(os.fstat(file.fileno()))
            return Bytes(file.read(max_bytes + 1), None)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        return Bytes(None, f"the file cannot be read: {reason(error)}")


def _objects(fs: Any, paths: list[str], max_bytes: int) -> list[Bytes]:
    """Objects of a store, each in one request."""
    answers: dict[int, Bytes] = {}

    @again
    def ask() -> None:
        nonlocal problem
        missing = [i for i in range(len(paths)) if i not in answers]
        with as_os_error():
            found = fs.cat_ranges([paths[i] for i in missing], 0, max_bytes + 1, batch_size=CONNECTIONS)
        for i, answer in zip(missing, found, strict=True):
            try:
                answers[i] = Bytes(whole(answer), None)
            except OSError as error:
                if is_outage(error):
                    problem = Unavailable(f"{paths[i]!r} cannot be read: {reason(error)}")
                elif isinstance(error, PermissionError) and any(word in str(error).lower() for word in _EXPIRED):
                    raise StorageError(f"{paths[i]!r} cannot be read: {reason(error)}") from error
                else:
                    answers[i] = Bytes(None, f"the file cannot be read: {reason(error)}")
        if len(answers) < len(paths):
            assert problem is not None
            raise problem

    problem: Unavailable | None = None
    ask()
    return [answers[i] for i in range(len(paths))]


def _web(uri: bytes, max_bytes: int) -> Bytes:
    """What a web server answers; its failures are the image's, since of many servers some are always gone."""
    try:
        for attempt in range(3):
            response = urllib3.request(
                "GET", uri.decode(), preload_content=False, timeout=WEB, retries=WEB_RETRIES, headers=WEB_HEADERS
            )
            try:
                if response.status != 200:
                    return Bytes(None, f"the web server answers {response.status} {response.reason or ''}".rstrip())
                return Bytes(response.read(max_bytes + 1), None)
            except (urllib3.exceptions.ProtocolError, urllib3.exceptions.ReadTimeoutError):
                if attempt == 2:
                    raise
            finally:
                response.drain_conn() if response.length_remaining in (None, 0) else response.close()
                response.release_conn()
        raise AssertionError
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        return Bytes(None, f"the web server cannot be read: {_words(error)}")


def _words(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error
    return f"{type(cause).__name__}: {reason(cause)}" if isinstance(cause, Exception) else str(cause)
