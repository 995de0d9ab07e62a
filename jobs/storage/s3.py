"""S3 filesystems, configured by the options at the end of a URI."""

from __future__ import annotations

from typing import Any

import fsspec

from jobs.storage.retry import StorageError

CONNECTIONS = 32
"""Maximum number of concurrent requests of one process to an object store."""


_S3_OPTIONS = ("endpoint", "region", "profile", "anonymous", "timeout")


def s3_filesystem(uri: str, options: dict[str, str]) -> fsspec.AbstractFileSystem:
    """Creates the filesystem of an S3 URI.

    Args:
        uri: The URI without its options, for error messages and to detect credentials in it.
        options: Any of `endpoint`, `region`, `profile`, `anonymous` and `timeout` (seconds without a byte).

    Raises:
        StorageError: the URI holds credentials, or an option is unknown or malformed.
    """
    import s3fs  # the import takes most of a second

    bucket = uri.partition("://")[2].partition("/")[0]
    if "@" in bucket or any("key" in name or "secret" in name for name in options):
        raise StorageError(
            "an s3 URI must not hold credentials, which would be kept with the dataset; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or name a profile"
        )
    if unknown := [name for name in options if name not in _S3_OPTIONS]:
        raise StorageError(f"{uri!r} has the unknown option {unknown[0]!r}; valid options: {', '.join(_S3_OPTIONS)}")
    try:
        timeout = float(options.get("timeout", 30))
    except ValueError:
        timeout = -1
    if timeout <= 0:
        raise StorageError(f"the timeout of {uri!r} must be a number of seconds above 0, got {options['timeout']!r}")
    if (anonymous := options.get("anonymous", "false")) not in ("true", "false"):
        raise StorageError(f"anonymous must be true or false in {uri!r}, got {anonymous!r}")
    profile: dict[str, Any] = {"profile": options["profile"]} if "profile" in options else {}
    return s3fs.S3FileSystem(
        anon=anonymous == "true",
        endpoint_url=options.get("endpoint"),
        client_kwargs={"region_name": options["region"]} if "region" in options else {},
        config_kwargs={
            "connect_timeout": 10,
            "read_timeout": timeout,
            "max_pool_connections": CONNECTIONS,
            "retries": {"mode": "standard", "max_attempts": 4},  # with backoff; s3fs itself multiplies these by five
        },
        use_listings_cache=False,  # other processes write to the same folders
        **profile,
    )
