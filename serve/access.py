"""Authentication, rate limiting and request size limits, enforced before an endpoint runs; also the request log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from alit.errors import ConfigError
from serve.problems import ProblemError, respond
from serve.settings import Settings, is_loopback

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

KEYS_VARIABLE = "ALIT_KEYS"
HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
PUBLIC_PATHS = ("/healthz", "/readyz", "/", "/openapi.json")
"""Paths that need no API key: they cost little work and reveal no data."""
MIN_KEY_LENGTH = 16
log = logging.getLogger("ray.serve.alit")
"""Serve's own handlers write its fields, with the request's id, to the replica's log file."""

_deadline: ContextVar[float] = ContextVar("_deadline")


def seconds_left() -> float:
    """Returns the seconds until the deadline of the current request."""
    return _deadline.get() - time.monotonic()


def read_keys(settings: Settings) -> dict[str, bytes]:
    """Reads the API keys from the keys file and from the environment's ALIT_KEYS (name:key,name:key).

    Args:
        settings: The settings, which name the file.

    Returns:
        SHA-256 digests of the keys, by the keys' names.

    Raises:
        ConfigError: The file cannot be read, or an entry is not `name:key`.
    """
    lines = os.environ.get(KEYS_VARIABLE, "").split(",")
    if settings.keys_file is not None:
        try:
            lines += Path(settings.keys_file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the keys file {settings.keys_file!r} cannot be read: {error}") from error
    keys: dict[str, bytes] = {}
    for number, line in enumerate(stripped for line in lines if (stripped := line.strip()) and stripped[0] != "#"):
        name, separator, key = line.partition(":")
        if not separator or not name.strip() or len(key.strip()) < MIN_KEY_LENGTH:
            raise ConfigError(
                f"key {number + 1} must be written name:key, with a key of at least {MIN_KEY_LENGTH} characters"
            )
        keys[name.strip()] = hashlib.sha256(key.strip().encode()).digest()
    return keys


class RateLimit:
    """A token bucket for the requests of one API key; a burst is at most ten seconds' worth of requests.

    Args:
        per_minute: The sustained rate.
    """

    def __init__(self, per_minute: int) -> None:
        self.per_second, self.burst = per_minute / 60, max(1.0, per_minute / 6)
        self.available, self.updated = self.burst, time.monotonic()

    def acquire(self) -> float:
        """Takes one request from the bucket; returns the seconds to wait if it is empty, else 0."""
        now = time.monotonic()
        refilled = self.available + (now - self.updated) * self.per_second
        self.available, self.updated = min(self.burst, refilled), now
        if self.available < 1:
            return (1 - self.available) / self.per_second
        self.available -= 1
        return 0.0


class AccessMiddleware:
    """ASGI middleware that authenticates, limits and logs every request.

    Args:
        app: The ASGI application.
        settings: The service's settings.

    Raises:
        ConfigError: The API keys cannot be read.
    """

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.settings, self.keys = app, settings, read_keys(settings)
        log.setLevel(logging.INFO)
        self.bytes_in_flight = 0  # of the bodies of all requests in progress
        self.rate_limits = {name: RateLimit(settings.requests_per_minute) for name in self.keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request, as ASGI defines it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        started, status, key_name = time.monotonic(), 0, ""
        body = _LimitedBody(self, receive)

        async def send_response(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            key_name = self._authenticate(scope, headers)
            body.check_size(headers.get("content-length", "0"))
            _deadline.set(started + self.settings.deadline_seconds)
            async with asyncio.timeout(self.settings.deadline_seconds):
                await self.app(scope, body.receive, send_response)
        except ProblemError as error:
            await respond(error.status, error.detail, error.slug, error.headers)(scope, receive, send_response)
        except TimeoutError:
            if status:
                raise  # the response has begun: it can only be aborted
            await self._timeout_response(body.complete)(scope, receive, send_response)
        except Exception:
            status = status or 500  # which the application's outermost layer sends
            raise
        finally:
            self.bytes_in_flight -= body.size
            fields = {"method": scope["method"], "path": scope["path"], "status": status, "key": key_name}
            log.info("request", extra=fields | {"seconds": round(time.monotonic() - started, 4)})

    def retry_after(self) -> dict[str, str]:
        """Returns the Retry-After header of an overloaded service."""
        return {"Retry-After": str(self.settings.retry_after_seconds)}

    def _timeout_response(self, body_complete: bool) -> Any:
        seconds = f"{self.settings.deadline_seconds:g} seconds"
        if body_complete:
            return respond(503, f"the request was not completed within {seconds}", "busy", self.retry_after())
        return respond(408, f"the body was not received within {seconds}")

    def _authenticate(self, scope: Scope, headers: dict[str, str]) -> str:
        """Returns the name of the request's API key, empty if the request needs none.

        Raises:
            ProblemError: The key is missing, unknown, or over its rate limit.
        """
        if scope["path"] in PUBLIC_PATHS or scope["path"].startswith("/playground/"):
            return ""
        if not self.keys:
            # HAProxy connects from its own machine, whichever machine its client connects from
            local = os.environ.get(HAPROXY_VARIABLE) != "1" and is_loopback((scope.get("server") or [""])[0])
            if self.settings.keyless or local:
                return ""
            raise ProblemError(
                403,
                "this service has no API keys, and therefore only accepts requests from its own machine; its operator "
                "can configure keys",
            )
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            challenge = {"WWW-Authenticate": 'Bearer realm="alit"'}
            raise ProblemError(401, "send an API key as 'Authorization: Bearer KEY'", headers=challenge)
        digest = hashlib.sha256(key.strip().encode()).digest()
        matches = [name for name, known in self.keys.items() if hmac.compare_digest(known, digest)]
        if not matches:
            challenge = {"WWW-Authenticate": 'Bearer realm="alit", error="invalid_token"'}
            raise ProblemError(401, "unknown API key; ask the service's operator for one", headers=challenge)
        if wait := self.rate_limits[matches[0]].acquire():
            detail = f"this API key is limited to {self.settings.requests_per_minute} requests a minute"
            raise ProblemError(429, detail, "rate_limited", {"Retry-After": str(max(1, round(wait + 0.5)))})
        return matches[0]


class _LimitedBody:
    """A request's body, which ends the request if it exceeds a limit, whatever its Content-Length says."""

    def __init__(self, middleware: AccessMiddleware, receive: Receive) -> None:
        self._middleware, self._receive = middleware, receive
        self.size, self.complete = 0, False

    def check_size(self, length: str) -> None:
        """Raises a `ProblemError` if a size, as written in a header, is invalid or exceeds the limit."""
        limit = self._middleware.settings.max_body_bytes
        if not length.isdigit() or int(length) > limit:
            detail = f"the body may have at most {limit:,} bytes; send fewer or smaller images"
            raise ProblemError(413, detail, "body_too_large")

    async def receive(self) -> Message:
        """Returns the next message, and counts its bytes."""
        message = await self._receive()
        size = len(message.get("body", b""))
        self.size += size
        self.complete = self.complete or not message.get("more_body", False)
        self._middleware.bytes_in_flight += size
        self.check_size(str(self.size))
        if self._middleware.bytes_in_flight > self._middleware.settings.max_bytes_in_flight:
            detail = "server overloaded: too many request bytes in flight; try again later"
            raise ProblemError(503, detail, "busy", self._middleware.retry_after())
        return message
