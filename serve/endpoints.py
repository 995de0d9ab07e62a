"""The HTTP endpoints of the service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

import alit
from serve import openapi, problems
from serve.access import AccessMiddleware
from serve.bodies import encode_response, image_response, read_encode_body, validate
from serve.openapi import problem_responses
from serve.problems import ProblemError
from serve.schemas import DecodeRequest, EncodeAnswer, EncodeRequest, ImageFormat, ImageIn, Models
from serve.service import EncodingService

PLAYGROUND = Path(__file__).parent / "playground"
PLAYGROUND_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}


def make_app(service: EncodingService) -> FastAPI:
    """Returns the ASGI application: endpoints, error handlers, OpenAPI document and access control."""
    settings = service.settings
    app = FastAPI(
        title="alit",
        version=alit.__version__,
        summary="Images as adaptive-length tokens.",
        docs_url=None,  # its page loads scripts from a third party's host
        redoc_url=None,
        openapi_url="/openapi.json" if settings.openapi else None,
    )
    problems.install(app)
    openapi.install(app)
    _add_api(app, service)
    _add_health(app, service)
    _add_playground(app)
    app.add_middleware(AccessMiddleware, settings=settings)  # pyright: ignore[reportArgumentType]
    return app


def _add_api(app: FastAPI, service: EncodingService) -> None:
    post_problems = problem_responses(400, 401, 403, 408, 413, 415, 422, 429, 503)

    @app.post(
        "/v1/encode",
        response_model=EncodeAnswer,
        responses=openapi.ENCODE_RESPONSES | post_problems,
        openapi_extra={"requestBody": openapi.ENCODE_BODY, "parameters": openapi.FILE_PARAMETERS},
    )
    async def encode(request: Request) -> Response:
        """Encode one or more images into as many tokens as the criterion requires; one result or error per image."""
        answer = await service.encode(*await read_encode_body(request, service.settings.max_images, service.executor))
        return await service.run_in_thread(encode_response, answer, request.headers.get("accept", ""))

    @app.post(
        "/v1/decode",
        response_class=Response,
        responses=openapi.DECODE_RESPONSES | post_problems,
        openapi_extra={"requestBody": openapi.DECODE_BODY},
    )
    async def decode(request: Request) -> Response:
        """Decode tokens of mixed lengths: an image file, or a zip archive of several."""
        body = await service.run_in_thread(validate, DecodeRequest, await request.body())
        await service.load_models()
        model = service.model(body.model)
        service.check_tokens(body, model)
        pixels = await service.decode(model.name, [np.array(tokens.ids) for tokens in body.images])
        return await service.run_in_thread(image_response, pixels, body.format, {"X-Alit-Weights": model.fingerprint})

    @app.post(
        "/v1/reconstruct",
        response_class=Response,
        responses=openapi.RECONSTRUCT_RESPONSES | post_problems,
        openapi_extra={"requestBody": openapi.FILE_BODY},
    )
    async def reconstruct(
        request: Request,
        tokens: Annotated[
            int | None, Query(ge=1, le=65536, description="The number of tokens; the criterion decides if omitted.")
        ] = None,
        criterion: Annotated[str | None, Query(max_length=100)] = None,
        model: Annotated[str | None, Query(max_length=64)] = None,
        image_format: Annotated[ImageFormat, Query(alias="format")] = "png",
    ) -> Response:
        """Encode an image file and decode its tokens: the reconstruction as an image file."""
        body = EncodeRequest(
            model=model, criterion=f"fixed:{tokens}" if tokens else criterion, images=[ImageIn(data="")]
        )
        answer = await service.encode(body, [await request.body()])
        (result,) = answer.results
        if result.error is not None:
            raise ProblemError(result.error.status, result.error.detail, result.error.type.rpartition(":")[2])
        pixels = await service.decode(answer.model, [np.array(result.ids)])
        headers = {"X-Alit-Tokens": str(result.num_tokens), "X-Alit-Weights": answer.fingerprint}
        return await service.run_in_thread(image_response, pixels, image_format, headers)

    @app.get("/v1/models", response_model=Models, responses=problem_responses(401, 403, 429, 503))
    async def models() -> Models:
        """List the models that requests can name."""
        await service.load_models()
        return Models(models=list(service.models.values()), default=next(iter(service.models)))


def _add_health(app: FastAPI, service: EncodingService) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, Literal["ok"]]:
        """Check that this process is alive."""
        return {"status": "ok"}

    @app.get("/readyz", responses=problem_responses(503))
    async def readyz() -> dict[str, Literal["ready"]]:
        """Check that the models are loaded and have encoded an image."""
        await service.check_ready()
        return {"status": "ready"}


def _add_playground(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PLAYGROUND / "index.html", headers=PLAYGROUND_HEADERS)

    app.mount("/playground", StaticFiles(directory=PLAYGROUND), "playground")
