"""The HTTP API on Ray Serve: parses, checks, answers, and decodes image files off the event loop; no model is here."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import FormData

import alit
from alit.errors import CriterionError
from alit.images import DecodedImage, ImageError, Limits, decode_image, encode_image
from alit.selection import parse
from serve import problems
from serve.config import Settings
from serve.doors import Doors
from serve.encoder import Done, Encoder, Work
from serve.problems import ProblemError
from serve.schemas import DecodeRequest, EncodeAnswer, EncodeRequest, ImageFormat, ImageIn, Models, Problem, Result

HERE = Path(__file__).parent / "playground"
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}
LATE = "the deadline passed before this image's turn"
ARROW, MSGPACK = "application/vnd.apache.arrow.stream", "application/msgpack"
FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {"application/problem+json": {}}, "description": problems.TITLES[status]}
    for status in (400, 401, 413, 415, 422, 429, 503)
}


class Api:
    """What the endpoints share: the settings, the models' descriptions and the way to them."""

    def __init__(self, settings: Settings, encoder: DeploymentHandle) -> None:
        self.settings, self.encoder = settings, encoder
        self.limits = Limits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_pixels)
        self.threads = ThreadPoolExecutor(4)
        self.models: dict[str, dict[str, Any]] = {}

    async def load(self) -> None:
        """Asks for the models, once they are there."""
        if not self.models:
            self.models = {model["name"]: model for model in await self.encoder.describe.remote()}

    def model(self, name: str | None) -> dict[str, Any]:
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ProblemError(
                422, f"there is no model {name!r:.70}; there are {', '.join(self.models)}", "unknown_model"
            )
        return self.models[name]

    def work(self, request: EncodeRequest, model: dict[str, Any]) -> Work:
        """What is asked for of every image, pixels still missing."""
        try:
            criterion = parse(request.criterion or model["default_criterion"], functions=False)
        except CriterionError as error:
            raise ProblemError(422, str(error), "unknown_criterion") from error
        name = criterion.spec.partition(":")[0]
        if name not in model["criteria"] or (criterion.length and criterion.length not in model["lengths"]):
            lengths = ", ".join(map(str, model["lengths"]))
            detail = f"this model gives {lengths} tokens, by {', '.join(model['criteria'])}; got {criterion.spec!r}"
            raise ProblemError(422, detail, "unknown_criterion")
        most = request.max_tokens
        if most is not None:
            if most < model["lengths"][0]:
                raise ProblemError(422, f"max_tokens must be at least {model['lengths'][0]}, got {most}")
            most = max(length for length in model["lengths"] if length <= most)
        extras = frozenset(request.returns)
        longest = most or model["lengths"][-1]
        cost = sum(length for length in model["lengths"] if length <= longest)
        if extras & {"every_length", "attention"}:
            cost += sum(model["lengths"])
        deadline = time.time() + self.settings.deadline_seconds
        return Work(model["name"], np.empty(0, np.uint8), criterion.spec, cost, deadline, most, extras)

    async def results(self, request: EncodeRequest, files: Sequence[bytes | ProblemError]) -> EncodeAnswer:
        """One result per image, in order."""
        await self.load()
        most = self.settings.max_images
        if len(files) > most:
            raise ProblemError(413, f"a request may hold {most} images, got {len(files)}", "too_many_images")
        model = self.model(request.model)
        work = self.work(request, model)
        names = [image.id for image in request.images] or [None] * len(files)
        images = await asyncio.gather(*(self.decoded(file, model["image_size"]) for file in files))
        works = [replace(work, pixels=image.pixels) for image in images if isinstance(image, DecodedImage)]
        fingerprint, done = model["fingerprint"], iter(())
        if works:
            answered = await self.ask(self.models_of(model).encode.remote(works), work.deadline)
            if answered is None:
                raise self.busy("more images wait already than can be encoded soon; come back later")
            fingerprint, done = answered.fingerprint, iter(answered.images)
        results = []
        for i, image in enumerate(images):
            if isinstance(image, DecodedImage):
                result = self.result(i, next(done), image, work.extras)
            else:
                result = Result(index=i, error=Problem(**image.document()))
            result.id = names[i]
            results.append(result)
        if all(result.error is not None and result.error.status == 503 for result in results):
            raise self.busy(LATE)  # nothing was done: the whole request may come again
        return EncodeAnswer(model=model["name"], fingerprint=fingerprint, criterion=work.criterion, results=results)

    def models_of(self, model: dict[str, Any]) -> DeploymentHandle:
        """The way to the replicas that hold this model, before others that would have to load it."""
        return self.encoder.options(multiplexed_model_id=model["name"])

    def busy(self, detail: str) -> ProblemError:
        return ProblemError(503, detail, "busy", {"Retry-After": str(self.settings.retry_after_seconds)})

    def result(self, index: int, done: Done, image: DecodedImage, extras: frozenset[str]) -> Result:
        if done.late:
            return Result(index=index, error=Problem(**self.busy(LATE).document()))
        return Result(
            index=index,
            num_tokens=done.num_tokens,
            score=done.score,
            satisfied=done.satisfied,
            width=image.width,
            height=image.height,
            ids=done.ids if "ids" in extras else None,
            trace=done.trace if "trace" in extras else None,
            **done.more,
        )

    async def ask(self, answer: Any, deadline: float) -> Any:
        """An answer of the models, while somebody waits for it.

        Raises:
            ProblemError: there is none in time, or they have enough to do.
        """
        try:
            return await asyncio.wait_for(answer, max(0.01, deadline - time.time()))
        except BackPressureError as error:
            raise self.busy("there is more to do than can be done; come back later") from error
        except TimeoutError as error:
            raise self.busy(f"nothing within {self.settings.deadline_seconds:g} seconds") from error
        except RayActorError as error:
            raise self.busy("a process of the service was lost while it worked on this; send it again") from error

    async def decoded(self, file: bytes | ProblemError, size: int) -> DecodedImage | ProblemError:
        if isinstance(file, ProblemError):
            return file
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.threads, decode_image, file, size, self.limits)
        except ImageError as error:
            status = 413 if error.reason in ("too_many_bytes", "too_many_pixels") else 422
            return ProblemError(status, str(error), error.reason)


async def read_request(request: Request, api: Api) -> tuple[EncodeRequest, Sequence[bytes | ProblemError]]:
    """The options and files of a request: JSON, multipart, or an image file as the body with options in the query."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = await request.body()
        try:
            found = EncodeRequest.model_validate_json(body)
        except ValidationError as error:
            raise invalid(error) from error
        return found, [from_base64(image.data) for image in found.images]
    if kind == "multipart/form-data":
        form: FormData = await request.form(max_files=api.settings.max_images, max_fields=20)
        files = [await item.read() for _, item in form.multi_items() if not isinstance(item, str)]
        options: dict[str, Any] = {name: value for name, value in form.multi_items() if isinstance(value, str)}
        if "return" in options:
            options["return"] = str(options["return"]).split(",")
    elif kind.startswith("image/") or kind == "application/octet-stream":
        files, options = [await request.body()], dict(request.query_params)
        if "return" in options:
            options["return"] = options["return"].split(",")
    else:
        detail = (
            f"send application/json, multipart/form-data, or an image/* file as the body, got {kind or 'nothing'!r:.80}"
        )
        raise ProblemError(415, detail)
    if not files:
        raise ProblemError(422, "the request holds no image file", "no_images")
    try:
        return EncodeRequest.model_validate(options | {"images": [{"data": ""}] * len(files)}), files
    except ValidationError as error:
        raise invalid(error) from error


def invalid(error: ValidationError) -> ProblemError:
    parts = [f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors(include_input=False)[:5]]
    return ProblemError(422, "; ".join(parts))


def from_base64(text: str) -> bytes | ProblemError:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        return ProblemError(422, f"the data is no base64: {error}", "not_base64")


def render(answer: EncodeAnswer, accept: str) -> Response:
    """The answer as its reader wants it: JSON, Arrow or msgpack."""
    told = answer.model_dump(exclude_none=True)
    if ARROW in accept:
        common = {"model": told["model"], "fingerprint": told["fingerprint"]}
        names = dict.fromkeys(name for result in told["results"] for name in result)
        rows = [common | {name: result.get(name) for name in names} for result in told["results"]]
        table = pa.Table.from_pylist(rows)
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return Response(sink.getvalue(), media_type=ARROW)
    if MSGPACK in accept or "application/x-msgpack" in accept:
        import msgpack

        return Response(msgpack.packb(told), media_type=MSGPACK)
    return Response(json.dumps(told), media_type="application/json")


def make_app(api: Api) -> FastAPI:
    """The endpoints."""
    settings = api.settings
    app = FastAPI(
        title="alit",
        version=alit.__version__,
        summary="Images as adaptive-length tokens.",
        docs_url="/docs" if settings.docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if settings.docs else None,
    )
    problems.install(app)
    body = {
        "required": True,
        "content": {
            "application/json": {
                "schema": EncodeRequest.model_json_schema(ref_template="#/components/schemas/{model}")
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "model": {"type": "string"},
                        "criterion": {"type": "string"},
                        "max_tokens": {"type": "integer"},
                        "return": {"type": "string"},
                    },
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }

    @app.post("/v1/encode", response_model=EncodeAnswer, responses=FAULTS, openapi_extra={"requestBody": body})
    async def encode(request: Request) -> Response:
        """Tokens of one or many images, each as long as its criterion asks for; one result or error per image."""
        asked, files = await read_request(request, api)
        return render(await api.results(asked, files), request.headers.get("accept", ""))

    @app.post("/v1/decode", responses=FAULTS)
    async def decode(asked: DecodeRequest) -> Response:
        """Images from tokens of mixed lengths: a picture, or a zip of `0.png`, `1.png` … of several."""
        await api.load()
        if len(asked.images) > api.settings.max_images:
            detail = f"a request may hold {api.settings.max_images} images, got {len(asked.images)}"
            raise ProblemError(413, detail, "too_many_images")
        model = api.model(asked.model)
        if asked.fingerprint is not None and asked.fingerprint != model["fingerprint"]:
            detail = f"model {model['name']!r} has the weights {model['fingerprint']}, not {asked.fingerprint!r}"
            raise ProblemError(422, detail, "other_weights")
        for number, tokens in enumerate(asked.images):
            if len(tokens.ids) not in model["lengths"]:
                lengths = ", ".join(map(str, model["lengths"]))
                raise ProblemError(422, f"images.{number}: this model decodes {lengths} tokens, got {len(tokens.ids)}")
            if max(tokens.ids) >= model["codebook_size"]:
                most = model["codebook_size"] - 1
                raise ProblemError(422, f"images.{number}: ids must lie from 0 to {most}, got {max(tokens.ids)}")
        deadline = time.time() + api.settings.deadline_seconds
        rows = [np.array(tokens.ids) for tokens in asked.images]
        pixels = await api.ask(api.models_of(model).decode.remote(model["name"], rows), deadline)
        return pictures(pixels, asked.format)

    @app.post(
        "/v1/reconstruct",
        responses=FAULTS,
        openapi_extra={"requestBody": {"required": True, "content": {"image/*": body["content"]["image/*"]}}},
    )
    async def reconstruct(
        request: Request,
        tokens: Annotated[
            int | None, Query(ge=1, description="The code's length; the criterion's choice if not given.")
        ] = None,
        criterion: Annotated[str | None, Query(max_length=100)] = None,
        model: Annotated[str | None, Query(max_length=64)] = None,
        format: ImageFormat = "png",
    ) -> Response:
        """What a code of some length makes of an image: a file in, a picture out."""
        asked = EncodeRequest(
            model=model, criterion=f"fixed:{tokens}" if tokens else criterion, images=[ImageIn(data="")]
        )
        answer = await api.results(asked, [await request.body()])
        (result,) = answer.results
        if result.error is not None:
            raise ProblemError(result.error.status, result.error.detail, result.error.type.rpartition(":")[2])
        deadline = time.time() + api.settings.deadline_seconds
        pixels = await api.ask(
            api.models_of(api.models[answer.model]).decode.remote(answer.model, [np.array(result.ids)]), deadline
        )
        return pictures(pixels, format, {"X-Alit-Tokens": str(result.num_tokens), "X-Alit-Weights": answer.fingerprint})

    @app.get("/v1/models", response_model=Models, responses={s: FAULTS[s] for s in (401, 429, 503)})
    async def models() -> Any:
        """The weights that can be asked for."""
        await api.load()
        return {"models": list(api.models.values()), "default": next(iter(api.models))}

    @app.get("/healthz")
    async def healthz() -> dict[str, Literal["ok"]]:
        """Whether this process lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: FAULTS[503]})
    async def readyz() -> dict[str, Literal["ready"]]:
        """Whether the models are loaded and have encoded an image."""
        try:
            await asyncio.wait_for(api.load(), 5)
        except Exception as error:
            raise api.busy("the models are not loaded yet") from error
        return {"status": "ready"}

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(HERE / "index.html", headers=PAGE_HEADERS)

    app.mount("/playground", StaticFiles(directory=HERE), "playground")
    app.add_middleware(Doors, settings=settings)  # pyright: ignore[reportArgumentType]
    return app


def pictures(pixels: np.ndarray, format: ImageFormat, headers: dict[str, str] | None = None) -> Response:
    files = [encode_image(np.ascontiguousarray(image), format) for image in pixels]
    if len(files) == 1:
        return Response(files[0], media_type=f"image/{format}", headers=headers)
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for number, file in enumerate(files):
            archive.writestr(f"{number}.{format}", file)
    return Response(sink.getvalue(), media_type="application/zip", headers=headers)


@serve.deployment
@serve.ingress()
class Ingress:
    """Speaks HTTP."""

    def __init__(self, settings: Settings, encoder: DeploymentHandle) -> None:
        self.api = Api(settings, encoder)

    def __serve_build_asgi_app__(self) -> FastAPI:  # called by Serve after the constructor
        return make_app(self.api)


def build(settings: Settings) -> serve.Application:
    """The Serve application: `serve deploy` and `serve run` call it with the YAML's `args`, `alit serve` does too."""
    ongoing = 2 * settings.queue  # requests; the replica itself counts their images
    deployments: tuple[Any, Any] = Encoder, Ingress  # which Serve's decorators type as functions
    encoder = deployments[0].options(
        ray_actor_options={"num_cpus": settings.threads, "num_gpus": settings.gpus_per_replica},
        max_ongoing_requests=ongoing,
        max_queued_requests=settings.queue,
        graceful_shutdown_timeout_s=settings.deadline_seconds,
        **(
            {"num_replicas": settings.min_replicas}
            if settings.min_replicas == settings.max_replicas
            else {
                "autoscaling_config": {
                    "min_replicas": settings.min_replicas,
                    "max_replicas": settings.max_replicas,
                    "target_ongoing_requests": settings.target_requests,
                }
            }
        ),
    )
    ingress = deployments[1].options(
        num_replicas=settings.api_replicas,
        max_ongoing_requests=2 * ongoing,
        graceful_shutdown_timeout_s=settings.deadline_seconds,
    )
    return ingress.bind(settings, encoder.bind(settings))
