"""A client of the API, synchronous and asynchronous: small, patient where the service asks for patience, without torch.

from serve.client import Client

with Client("http://127.0.0.1:8000") as alit:
    first, second = alit.encode([open("a.jpg", "rb").read(), open("b.jpg", "rb").read()], criterion="l1:0.08")
    picture = alit.decode([first["ids"]])[0]
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
import zipfile
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import httpx

RETRIED = (429, 502, 503, 504)


class ServiceError(Exception):
    """The service did not do what was asked.

    Attributes:
        status: of HTTP.
        problem: the problem document; its `detail` is the exception's text.
    """

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(problem.get("detail") or problem.get("title") or f"status {status}")
        self.status, self.problem = status, problem


class _Common:
    """What both clients say and understand."""

    def __init__(self, tries: int) -> None:
        if tries < 1:
            raise ValueError(f"tries must be at least 1, got {tries}")
        self.tries = tries

    @staticmethod
    def _options(url: str, key: str | None, timeout: float) -> dict[str, Any]:
        return {"base_url": url, "timeout": timeout, "headers": {"Authorization": f"Bearer {key}"} if key else {}}

    @staticmethod
    def _encode_body(images: Sequence[bytes], options: dict[str, Any]) -> dict[str, Any]:
        body: dict[str, Any] = {"images": [{"data": base64.b64encode(image).decode()} for image in images]}
        return body | {name.rstrip("_"): value for name, value in options.items() if value is not None}

    def _pause(self, response: httpx.Response | None, attempt: int) -> float | None:
        """Seconds until the next try; None where there is none."""
        if attempt + 1 >= self.tries or (response is not None and response.status_code not in RETRIED):
            return None
        told = response.headers.get("retry-after", "") if response is not None else ""
        least = float(told) if told.isdigit() else 0.2 * 2**attempt
        return least * (1 + 0.25 * random.random())  # not all clients at once

    @staticmethod
    def _checked(response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        try:
            problem = response.json()
        except ValueError:
            problem = {"detail": response.text[:300]}
        raise ServiceError(response.status_code, problem if isinstance(problem, dict) else {})

    @staticmethod
    def _pictures(response: httpx.Response) -> list[bytes]:
        if response.headers["content-type"] != "application/zip":
            return [response.content]
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            return [archive.read(name) for name in archive.namelist()]


class Client(_Common):
    """Talks to a service.

    Args:
        url: where it is, such as `http://127.0.0.1:8000`.
        key: an API key, where the service asks for one.
        timeout: seconds without an answer before a try is given up.
        tries: how often a request is sent at most, when the service is busy or out of reach.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 60, tries: int = 5) -> None:
        super().__init__(tries)
        self._http = httpx.Client(**self._options(url, key, timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def encode(
        self,
        images: Sequence[bytes],
        *,
        criterion: str | None = None,
        max_tokens: int | None = None,
        model: str | None = None,
        return_: Sequence[str] = ("ids",),
    ) -> list[dict[str, Any]]:
        """One result per image file, in order: a dict with `ids` and the rest, or with `error`.

        Raises:
            ServiceError: the whole request was refused, or the service stayed busy.
            httpx.TransportError: it could not be reached.
        """
        options = {"criterion": criterion, "max_tokens": max_tokens, "model": model, "return_": list(return_)}
        return self._send("POST", "/v1/encode", json=self._encode_body(images, options)).json()["results"]

    def decode(self, tokens: Sequence[Sequence[int]], *, model: str | None = None, format: str = "png") -> list[bytes]:
        """Picture files from ids of mixed lengths."""
        body = {"images": [{"ids": list(ids)} for ids in tokens], "model": model, "format": format}
        return self._pictures(self._send("POST", "/v1/decode", json=body))

    def models(self) -> dict[str, Any]:
        """The weights that can be asked for."""
        return self._send("GET", "/v1/models").json()

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        response: httpx.Response | None = None
        for attempt in range(self.tries):
            response = None
            try:
                response = self._http.request(method, path, **content)
            except httpx.TransportError:
                if attempt + 1 == self.tries:
                    raise
            if (pause := self._pause(response, attempt)) is None:
                break
            time.sleep(pause)
        assert response is not None
        return self._checked(response)


class AsyncClient(_Common):
    """The same, for asyncio."""

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 60, tries: int = 5) -> None:
        super().__init__(tries)
        self._http = httpx.AsyncClient(**self._options(url, key, timeout))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._http.aclose()

    async def encode(
        self,
        images: Sequence[bytes],
        *,
        criterion: str | None = None,
        max_tokens: int | None = None,
        model: str | None = None,
        return_: Sequence[str] = ("ids",),
    ) -> list[dict[str, Any]]:
        """As `Client.encode`."""
        options = {"criterion": criterion, "max_tokens": max_tokens, "model": model, "return_": list(return_)}
        return (await self._send("POST", "/v1/encode", json=self._encode_body(images, options))).json()["results"]

    async def decode(
        self, tokens: Sequence[Sequence[int]], *, model: str | None = None, format: str = "png"
    ) -> list[bytes]:
        """As `Client.decode`."""
        body = {"images": [{"ids": list(ids)} for ids in tokens], "model": model, "format": format}
        return self._pictures(await self._send("POST", "/v1/decode", json=body))

    async def models(self) -> dict[str, Any]:
        """As `Client.models`."""
        return (await self._send("GET", "/v1/models")).json()

    async def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        response: httpx.Response | None = None
        for attempt in range(self.tries):
            response = None
            try:
                response = await self._http.request(method, path, **content)
            except httpx.TransportError:
                if attempt + 1 == self.tries:
                    raise
            if (pause := self._pause(response, attempt)) is None:
                break
            await asyncio.sleep(pause)
        assert response is not None
        return self._checked(response)
