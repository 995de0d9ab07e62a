"""Who may come in, how often and with how much: keys, rates, sizes, request ids, the log; before any work is done."""

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

KEYS = "ALIT_KEYS"
OPEN = ("/healthz", "/readyz", "/", "/openapi.json")
"""What is answered without a key: little of it costs work, and nothing tells of data."""
HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
UNTIL: ContextVar[float] = ContextVar("UNTIL")
log = logging.getLogger("ray.serve.alit")
"""Serve's own handlers write its fields, with the request's id, to the replica's log file."""


def seconds_left() -> float:
    """For which the client of this request is told to wait."""
    return UNTIL.get() - time.monotonic()


def read_keys(settings: Settings) -> dict[str, bytes]:
    """SHA-256 digests of the API keys by name, from the file and from the environment's ALIT_KEYS (name:key,name:key).

    Raises:
        ConfigError: the file cannot be read, or a line is no `name:key`.
    """
    lines = os.environ.get(KEYS, "").split(",")
    if settings.keys_file is not None:
        try:
            lines += Path(settings.keys_file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the keys in {settings.keys_file!r} cannot be read: {error}") from error
    keys: dict[str, bytes] = {}
    for number, line in enumerate(stripped for line in lines if (stripped := line.strip()) and stripped[0] != "#"):
        name, separator, key = line.partition(":")
        if not separator or not name.strip() or len(key.strip()) < 16:
            raise ConfigError(f"key {number + 1} must be written name:key, with a key of 16 characters or more")
        keys[name.strip()] = hashlib.sha256(key.strip().encode()).digest()
    return keys


class Rate:
    """Requests of one key: so many a minute, saved up for at most ten seconds."""

    def __init__(self, per_minute: int) -> None:
        self.per_second, self.most = per_minute / 60, max(1.0, per_minute / 6)
        self.saved, self.since = self.most, time.monotonic()

    def wait(self) -> float:
        """Takes one; the seconds to wait where there is none."""
        now = time.monotonic()
        self.saved, self.since = min(self.most, self.saved + (now - self.since) * self.per_second), now
        if self.saved < 1:
            return (1 - self.saved) / self.per_second
        self.saved -= 1
        return 0.0


class Doors:
    """ASGI middleware, around all endpoints."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.settings, self.keys = app, settings, read_keys(settings)
        log.setLevel(logging.INFO)
        self.held = 0  # bytes of the bodies of all requests under way
        self.rates = {name: Rate(settings.requests_per_minute) for name in self.keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        started, status, name = time.monotonic(), 0, ""
        body = Body(self, receive)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            name = self._admit(scope, headers)
            body.check(headers.get("content-length", "0"))
            UNTIL.set(started + self.settings.deadline_seconds)
            async with asyncio.timeout(self.settings.deadline_seconds):
                await self.app(scope, body.receive, answer)
        except ProblemError as error:
            await respond(error.status, error.detail, error.slug, error.headers)(scope, receive, answer)
        except TimeoutError:
            if status:
                raise  # in the middle of an answer: all that is left is to break off
            late, seconds = self.late(), f"{self.settings.deadline_seconds:g} seconds"
            if body.whole:
                await respond(503, f"nothing was found within {seconds}", "busy", late)(scope, receive, answer)
            else:
                await respond(408, f"the body did not come within {seconds}")(scope, receive, answer)
        except Exception:
            status = status or 500  # which the application's outermost layer answers
            raise
        finally:
            self.held -= body.taken
            line = {"method": scope["method"], "path": scope["path"], "status": status, "key": name}
            log.info("request", extra=line | {"seconds": round(time.monotonic() - started, 4)})

    def late(self) -> dict[str, str]:
        """Headers that tell when to come back."""
        return {"Retry-After": str(self.settings.retry_after_seconds)}

    def _admit(self, scope: Scope, headers: dict[str, str]) -> str:
        """The name of the request's key."""
        if scope["path"] in OPEN or scope["path"].startswith("/playground/"):
            return ""
        if not self.keys:
            # HAProxy comes from its own machine, whoever has come to it
            here = os.environ.get(HAPROXY) != "1" and is_loopback((scope.get("server") or [""])[0])
            if self.settings.keyless or here:
                return ""
            detail = "this service has no keys, and so answers on its own machine alone; its operator can give it some"
            raise ProblemError(403, detail)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            challenge = {"WWW-Authenticate": 'Bearer realm="alit"'}
            raise ProblemError(401, "send a key as 'Authorization: Bearer KEY'", headers=challenge)
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = [name for name, known in self.keys.items() if hmac.compare_digest(known, digest)]
        if not found:
            challenge = {"WWW-Authenticate": 'Bearer realm="alit", error="invalid_token"'}
            raise ProblemError(401, "this key is not known; ask the service's operator for one", headers=challenge)
        if wait := self.rates[found[0]].wait():
            detail = f"this key may make {self.settings.requests_per_minute} requests a minute"
            raise ProblemError(429, detail, "rate_limited", {"Retry-After": str(max(1, round(wait + 0.5)))})
        return found[0]


class Body:
    """A request's body, which ends the request where it is larger than allowed, whatever its header said."""

    def __init__(self, doors: Doors, receive: Receive) -> None:
        self.doors, self._receive, self.taken, self.whole = doors, receive, 0, False

    def check(self, length: str) -> None:
        """Refuses what its header says is too long."""
        most = self.doors.settings.max_body_bytes
        if not length.isdigit() or int(length) > most:
            detail = f"the body may have {most:,} bytes; send fewer or smaller images"
            raise ProblemError(413, detail, "body_too_large")

    async def receive(self) -> Message:
        """The next piece."""
        message = await self._receive()
        size = len(message.get("body", b""))
        self.taken += size
        self.whole = self.whole or not message.get("more_body", False)
        self.doors.held += size
        self.check(str(self.taken))
        if self.doors.held > self.doors.settings.max_bytes_in_flight:
            raise ProblemError(503, "too much is being sent at once; come back later", "busy", self.doors.late())
        return message
