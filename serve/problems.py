"""What the API answers when it does not do what was asked: RFC 9457 problem documents."""

from __future__ import annotations

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


class ProblemError(Exception):
    """Ends a request with a problem document.

    Args:
        status: of HTTP.
        detail: a sentence for the client: what was wrong, and what would be right.
        slug: names the kind of problem, for programs.
        headers: besides the usual ones.
    """

    def __init__(self, status: int, detail: str, slug: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.slug, self.headers = status, detail, slug, headers

    def document(self) -> dict[str, Any]:
        return problem(self.status, self.detail, self.slug)


def problem(status: int, detail: str, slug: str = "") -> dict[str, Any]:
    """A problem document."""
    title = TITLES.get(status, "error")
    kind = slug or title.replace(" ", "_")
    return {"type": f"urn:alit:problem:{kind}", "title": title, "status": status, "detail": detail}


def respond(status: int, detail: str, slug: str = "", headers: dict[str, str] | None = None) -> JSONResponse:
    """A problem document as an answer."""
    return JSONResponse(problem(status, detail, slug), status, headers, media_type="application/problem+json")


def install(app: FastAPI) -> None:
    """Makes every error of the application a problem document."""

    @app.exception_handler(ProblemError)
    async def ours(request: Request, error: ProblemError) -> JSONResponse:
        return respond(error.status, error.detail, error.slug, error.headers)

    @app.exception_handler(HTTPException)
    async def theirs(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers) if error.headers else None
        return respond(error.status_code, str(error.detail), headers=headers)

    @app.exception_handler(RequestValidationError)
    async def shape(request: Request, error: RequestValidationError) -> JSONResponse:
        parts = [f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors()[:5]]
        return respond(422, "; ".join(parts))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        return respond(500, "the server failed; its log says why, under this request's id")
