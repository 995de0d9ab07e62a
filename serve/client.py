"""Clients of the API, synchronous and asynchronous. They need only httpx, and retry while the service is overloaded.

from serve.client import Client

with Client("http://127.0.0.1:8000") as client:
    first, second = client.encode([open("a.jpg", "rb").read(), open("b.jpg", "rb").read()], criterion="l1:0.08")
    (image,) = client.decode([first["ids"]])
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

RETRIED_STATUSES = (429, 502, 503, 504)
BACKOFF_SECONDS = 0.2
"""The pause before the second try, doubled before every further one, unless the service names a time."""


class ServiceError(Exception):
    """An error response of the service.

    Attributes:
        status: The HTTP status.
        problem: The problem document; its `detail` is the exception's text.
    """

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(problem.get("detail") or problem.get("title") or f"status {status}")
        self.status, self.problem = status, problem


MODELS_REQUEST: dict[str, Any] = {"method": "GET", "url": "/v1/models"}


class _Protocol:
    """What both clients share: requests, retries and responses, without the transport.

    A request is the dict of arguments of `httpx.Client.request`.
    """

    def __init__(self, tries: int) -> None:
        if tries < 1:
            raise ValueError(f"tries must be at least 1, got {tries}")
        self.tries = tries

    @staticmethod
    def _options(url: str, key: str | None, timeout: float) -> dict[str, Any]:
        return {"base_url": url, "timeout": timeout, "headers": {"Authorization": f"Bearer {key}"} if key else {}}

    @staticmethod
    def _encode_request(images: Sequence[bytes], returns: Sequence[str], **options: Any) -> dict[str, Any]:
        body: dict[str, Any] = {"images": [{"data": base64.b64encode(image).decode()} for image in images]}
        body |= {name: value for name, value in options.items() if value is not None}
        return {"method": "POST", "url": "/v1/encode", "json": body | {"return": list(returns)}}

    @staticmethod
    def _decode_request(tokens: Sequence[Sequence[int]], model: str | None, image_format: str) -> dict[str, Any]:
        body = {"images": [{"ids": list(ids)} for ids in tokens], "model": model, "format": image_format}
        return {"method": "POST", "url": "/v1/decode", "json": body}

    def _pause(self, outcome: httpx.Response | httpx.TransportError, attempt: int) -> float | None:
        """Returns the seconds until the next try, or None if the outcome is final."""
        if attempt + 1 >= self.tries:
            return None
        seconds = BACKOFF_SECONDS * 2**attempt
        if isinstance(outcome, httpx.Response):
            if outcome.status_code not in RETRIED_STATUSES:
                return None
            retry_after = outcome.headers.get("retry-after", "")
            seconds = float(retry_after) if retry_after.isdigit() else seconds
        return seconds * (1 + 0.25 * random.random())  # jitter: clients must not all retry at the same time

    @staticmethod
    def _checked(outcome: httpx.Response | httpx.TransportError) -> httpx.Response:
        """Returns a successful response, and raises any other outcome."""
        if isinstance(outcome, httpx.TransportError):
            raise outcome
        if outcome.is_success:
            return outcome
        try:
            problem = outcome.json()
        except ValueError:
            problem = {"detail": outcome.text[:300]}
        raise ServiceError(outcome.status_code, problem if isinstance(problem, dict) else {})

    @staticmethod
    def _files(response: httpx.Response) -> list[bytes]:
        if response.headers["content-type"] != "application/zip":
            return [response.content]
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            return [archive.read(name) for name in archive.namelist()]


class Client(_Protocol):
    """A synchronous client of a service.

    Args:
        url: The service's address, such as `http://127.0.0.1:8000`.
        key: An API key, if the service requires one.
        timeout: Seconds to wait for a response before a try fails.
        tries: The maximum number of times that a request is sent while the service is overloaded or unreachable.

    Raises:
        ValueError: `tries` is less than 1.
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
        """Encodes image files.

        Args:
            images: The files' bytes.
            criterion: When an image has enough tokens, such as `l1:0.08`; by default the model's own criterion.
            max_tokens: The maximum code length.
            model: The model's name; by default the service's default model.
            return_: What a result contains: any of `ids`, `trace`, `reconstruction`, `every_length`, `attention`.

        Returns:
            One result per file, in order, as JSON: either `num_tokens` and the requested fields, or `error`.

        Raises:
            ServiceError: The service rejected the whole request, or was still overloaded at the last try.
            httpx.TransportError: The service could not be reached.
        """
        request = self._encode_request(images, return_, criterion=criterion, max_tokens=max_tokens, model=model)
        return self._send(request).json()["results"]

    def decode(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        model: str | None = None,
        format: str = "png",  # noqa: A002, as the API names it
    ) -> list[bytes]:
        """Decodes token ids, of mixed lengths, to image files.

        Args:
            tokens: The ids, one sequence per image.
            model: The name of the model that encoded them; by default the service's default model.
            format: The file format: `png`, `webp` or `jpeg`.

        Returns:
            One file per image, in order.

        Raises:
            ServiceError: The service rejected the request, or was still overloaded at the last try.
            httpx.TransportError: The service could not be reached.
        """
        return self._files(self._send(self._decode_request(tokens, model, format)))

    def models(self) -> dict[str, Any]:
        """Returns the models that requests can name, and the default one, as JSON."""
        return self._send(MODELS_REQUEST).json()

    def _send(self, request: dict[str, Any]) -> httpx.Response:
        attempt = 0
        while True:
            try:
                outcome = self._http.request(**request)
            except httpx.TransportError as error:
                outcome = error
            if (pause := self._pause(outcome, attempt)) is None:
                return self._checked(outcome)
            time.sleep(pause)
            attempt += 1


class AsyncClient(_Protocol):
    """An asynchronous client of a service; arguments, results and errors are those of `Client`."""

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
        """Encodes image files; see `Client.encode`."""
        request = self._encode_request(images, return_, criterion=criterion, max_tokens=max_tokens, model=model)
        return (await self._send(request)).json()["results"]

    async def decode(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        model: str | None = None,
        format: str = "png",  # noqa: A002, as the API names it
    ) -> list[bytes]:
        """Decodes token ids to image files; see `Client.decode`."""
        return self._files(await self._send(self._decode_request(tokens, model, format)))

    async def models(self) -> dict[str, Any]:
        """Returns the models that requests can name; see `Client.models`."""
        return (await self._send(MODELS_REQUEST)).json()

    async def _send(self, request: dict[str, Any]) -> httpx.Response:
        attempt = 0
        while True:
            try:
                outcome = await self._http.request(**request)
            except httpx.TransportError as error:
                outcome = error
            if (pause := self._pause(outcome, attempt)) is None:
                return self._checked(outcome)
            await asyncio.sleep(pause)
            attempt += 1
