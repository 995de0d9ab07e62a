"""Storage errors: which of them are permanent, and retries of those that are not."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import tenacity

from alit.errors import AlitError


class StorageError(AlitError):
    """A path that cannot be used; the message gives the reason."""


class UnavailableError(StorageError):
    """Storage that does not respond at the moment; the same request may succeed later."""


RETRY_SECONDS = 300
"""How long a request to an unavailable object store is retried, on top of the retries of the store's own client."""


retry_while_unavailable = tenacity.retry(
    retry=tenacity.retry_if_exception_type(UnavailableError),
    wait=tenacity.wait_random_exponential(multiplier=1, max=30),
    stop=tenacity.stop_after_delay(RETRY_SECONDS),
    reraise=True,
)
"""Decorator: retries a function with exponential backoff for `RETRY_SECONDS` while it raises `UnavailableError`."""


_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


_PERMANENT_ERRNOS = (errno.EINVAL, errno.EPERM, errno.ENAMETOOLONG, errno.ENOSYS, errno.EREMCHG)


def reason(error: BaseException) -> str:
    """Returns a one-line description of a storage error."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    text = text.strip().splitlines()[0]
    if isinstance(error, PermissionError) and "denied" not in text.lower():
        return f"permission denied: {text}"
    return text


@contextmanager
def as_os_error() -> Iterator[None]:
    """Converts the exceptions of object store clients to OSError, which local files raise too."""
    try:
        yield
    except (OSError, AlitError):
        raise
    except Exception as error:
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            raise PermissionError(
                "denied, as no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, "
                "or end the URI with ?anonymous=true for a public bucket"
            ) from error
        if _is_client_error(error):
            raise OSError(reason(error)) from error
        raise


def _is_client_error(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec")


def is_outage(error: OSError) -> bool:
    """Returns whether an error of an object store is transient and unrelated to the object: a retry may succeed."""
    if isinstance(error, _PERMANENT_ERRORS) or error.errno in _PERMANENT_ERRNOS:
        return False
    if "ValidationError" in type(error.__cause__).__name__:
        return False
    return isinstance(error, TimeoutError | ConnectionError) or error.__cause__ is not None or _is_client_error(error)


def range_result(result: bytes | BaseException) -> bytes:
    """Returns one result of fsspec's `cat_ranges`, or raises it if it is an error.

    Raises:
        OSError: the range could not be read.
    """
    if not isinstance(result, BaseException):
        return result
    text = str(result).lower()
    if "invalidrange" in text or ("range" in text and "satisf" in text):  # an empty object has no valid range
        return b""
    with as_os_error():
        raise result
