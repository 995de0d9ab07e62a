"""The HTTP endpoints of the service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

import alit
from serve import openapi, problems
from serve.access import Doors
from serve.bodies import checked, pictures, read_request, render
from serve.openapi import faults
from serve.problems import ProblemError
from serve.schemas import DecodeRequest, EncodeAnswer, EncodeRequest, ImageFormat, ImageIn, Models
from serve.service import Api

HERE = Path(__file__).parent / "playground"


PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}


def make_app(api: Api) -> FastAPI:
    """The endpoints."""
    settings = api.settings
    app = FastAPI(
        title="alit",
        version=alit.__version__,
        summary="Images as adaptive-length tokens.",
        docs_url=None,  # its page would come from a third party's host
        redoc_url=None,
        openapi_url="/openapi.json" if settings.openapi else None,
    )
    problems.install(app)
    openapi.install(app)
    every = faults(400, 401, 403, 408, 413, 415, 422, 429, 503)

    @app.post(
        "/v1/encode",
        response_model=EncodeAnswer,
        responses=openapi.ENCODED | every,
        openapi_extra={"requestBody": openapi.ENCODE_BODY, "parameters": openapi.RAW_OPTIONS},
    )
    async def encode(request: Request) -> Response:
        """Tokens of one or many images, each as long as its criterion asks for; one result or error per image."""
        answer = await api.encode(*await read_request(request, api))
        return await api.off_loop(render, answer, request.headers.get("accept", ""))

    @app.post(
        "/v1/decode",
        response_class=Response,
        responses=openapi.DECODED | every,
        openapi_extra={"requestBody": openapi.DECODE_BODY},
    )
    async def decode(request: Request) -> Response:
        """Images from tokens of mixed lengths: a picture, or a zip file of several."""
        asked = await api.off_loop(checked, DecodeRequest, await request.body())
        await api.load()
        model = api.model(asked.model)
        api.check_tokens(asked, model)
        pixels = await api.decode(model["name"], [np.array(tokens.ids) for tokens in asked.images])
        return await api.off_loop(pictures, pixels, asked.format, {"X-Alit-Weights": model["fingerprint"]})

    @app.post(
        "/v1/reconstruct",
        response_class=Response,
        responses=openapi.DRAWN | every,
        openapi_extra={"requestBody": openapi.FILE_BODY},
    )
    async def reconstruct(
        request: Request,
        tokens: Annotated[
            int | None, Query(ge=1, le=65536, description="The code's length; the criterion's choice if not given.")
        ] = None,
        criterion: Annotated[str | None, Query(max_length=100)] = None,
        model: Annotated[str | None, Query(max_length=64)] = None,
        format: ImageFormat = "png",
    ) -> Response:
        """What a code of some length makes of an image: a file in, a picture out."""
        asked = EncodeRequest(
            model=model, criterion=f"fixed:{tokens}" if tokens else criterion, images=[ImageIn(data="")]
        )
        answer = await api.encode(asked, [await request.body()])
        (result,) = answer.results
        if result.error is not None:
            raise ProblemError(result.error.status, result.error.detail, result.error.type.rpartition(":")[2])
        pixels = await api.decode(answer.model, [np.array(result.ids)])
        headers = {"X-Alit-Tokens": str(result.num_tokens), "X-Alit-Weights": answer.fingerprint}
        return await api.off_loop(pictures, pixels, format, headers)

    @app.get("/v1/models", response_model=Models, responses=faults(401, 403, 429, 503))
    async def models() -> Any:
        """The weights that can be asked for."""
        await api.load()
        return {"models": list(api.models.values()), "default": next(iter(api.models))}

    @app.get("/healthz")
    async def healthz() -> dict[str, Literal["ok"]]:
        """Whether this process lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses=faults(503))
    async def readyz() -> dict[str, Literal["ready"]]:
        """Whether the models are loaded and have encoded an image."""
        await api.ready()
        return {"status": "ready"}

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(HERE / "index.html", headers=PAGE_HEADERS)

    app.mount("/playground", StaticFiles(directory=HERE), "playground")
    app.add_middleware(Doors, settings=settings)  # pyright: ignore[reportArgumentType]
    return app
