"""Storage errors: which of them are final, and retrying those that are not."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import tenacity

from alit.errors import AlitError


class StorageError(AlitError):
    """A place that cannot be used; the message says why."""


class Unavailable(StorageError):
    """Storage that did not answer, and may again."""


PATIENCE = 300
"""Seconds for which an object store that does not answer is asked again, after what its client tries by itself."""


again = tenacity.retry(
    retry=tenacity.retry_if_exception_type(Unavailable),
    wait=tenacity.wait_random_exponential(multiplier=1, max=30),
    stop=tenacity.stop_after_delay(PATIENCE),
    reraise=True,
)
"""Decorates what is to be tried again while storage is unavailable."""


_REFUSED = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


_FINAL = (errno.EINVAL, errno.EPERM, errno.ENAMETOOLONG, errno.ENOSYS, errno.EREMCHG)


def reason(error: BaseException) -> str:
    """What an error of storage means, in one line."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    text = text.strip().splitlines()[0]
    if isinstance(error, PermissionError) and "denied" not in text.lower():
        return f"permission denied: {text}"
    return text


@contextmanager
def as_os_error() -> Iterator[None]:
    """Turns what object stores' clients raise of their own into OSError, which is what files raise."""
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
        if _of_client(error):
            raise OSError(reason(error)) from error
        raise


def _of_client(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec")


def is_outage(error: OSError) -> bool:
    """Whether an error of an object store says nothing about the object: the next try may succeed."""
    if isinstance(error, _REFUSED) or error.errno in _FINAL or "ValidationError" in type(error.__cause__).__name__:
        return False
    return isinstance(error, TimeoutError | ConnectionError) or error.__cause__ is not None or _of_client(error)
