"""Error responses of the API: RFC 9457 problem documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TITLES = {
    400: "bad request",
    401: "a key is needed",
    403: "not allowed",
    404: "not found",
    405: "method not allowed",
    406: "not acceptable",
    408: "the request took too long",
    413: "too large",
    415: "unsupported media type",
    422: "not as asked for",
    429: "too many requests",
    500: "internal error",
    503: "not available now",
}
"""Titles by status. Problem types are derived from them, so they are part of the API."""

MAX_FAULTS = 5
"""The number of invalid fields that an error names."""


class ProblemError(Exception):
    """Ends a request with a problem document.

    Args:
        status: The HTTP status.
        detail: A sentence for the client: what is wrong and what would be valid.
        slug: The problem type's last part, for programs; derived from the title if empty.
        headers: Additional response headers.
    """

    def __init__(self, status: int, detail: str, slug: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.slug, self.headers = status, detail, slug, headers

    def document(self) -> dict[str, Any]:
        """Returns the problem document."""
        return problem(self.status, self.detail, self.slug)


def problem(status: int, detail: str, slug: str = "") -> dict[str, Any]:
    """Returns a problem document; see `ProblemError` for the arguments."""
    title = TITLES.get(status, "error")
    kind = slug or title.replace(" ", "_")
    return {"type": f"urn:alit:problem:{kind}", "title": title, "status": status, "detail": detail}


def respond(status: int, detail: str, slug: str = "", headers: dict[str, str] | None = None) -> JSONResponse:
    """Returns a response with a problem document; see `ProblemError` for the arguments."""
    return JSONResponse(problem(status, detail, slug), status, headers, media_type="application/problem+json")


def validation_detail(errors: Iterable[Mapping[str, Any]]) -> str:
    """Returns pydantic's first errors as one sentence: the path of each invalid field, and what is wrong with it."""
    return "; ".join(
        f"{'.'.join(map(str, error['loc'])) or 'body'}: {error['msg']}" for error in list(errors)[:MAX_FAULTS]
    )


def install(app: FastAPI) -> None:
    """Registers exception handlers, so that every error response of the application is a problem document."""

    @app.exception_handler(ProblemError)
    async def problem_error(request: Request, error: ProblemError) -> JSONResponse:
        return respond(error.status, error.detail, error.slug, error.headers)

    @app.exception_handler(HTTPException)
    async def http_exception(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers) if error.headers else None
        return respond(error.status_code, str(error.detail), headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid_parameter(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = [fault | {"loc": fault["loc"][1:]} for fault in error.errors()]  # without "query"
        return respond(422, validation_detail(faults))

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception) -> JSONResponse:
        return respond(500, "the server failed; its log has the cause under this request's id")
