"""Request and response bodies: JSON, multipart and image files in; JSON, Arrow, msgpack and image files out."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import zipfile
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple, TypeVar

import msgpack
import numpy as np
import pyarrow as pa
from fastapi import Request, Response
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from alit.images.encode import encode_image
from serve.problems import ProblemError, validation_detail
from serve.schemas import ARROW, MSGPACK, EncodeAnswer, EncodeRequest, ImageFormat

M = TypeVar("M", bound=BaseModel)


class EncodeBody(NamedTuple):
    """The body of an encode request.

    Attributes:
        request: The options; its `images` hold no data.
        files: The image files in order, or the error of a file that could not be extracted from the body.
    """

    request: EncodeRequest
    files: Sequence[bytes | ProblemError]


async def read_encode_body(request: Request, max_images: int, executor: Executor) -> EncodeBody:
    """Reads JSON, multipart, or an image file with the options in the query.

    Args:
        request: The HTTP request.
        max_images: The maximum number of images in a multipart body.
        executor: Parses JSON, so that the event loop stays responsive.

    Raises:
        ProblemError: The body is invalid, or has another media type.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json":
        body = await request.body()
        return await asyncio.get_running_loop().run_in_executor(executor, _parse_json, body)
    if media_type == "multipart/form-data":
        form = await _read_form(request, max_images)
        files = [await item.read() for _, item in form.multi_items() if not isinstance(item, str)]
        options: dict[str, Any] = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    elif media_type.startswith("image/") or media_type == "application/octet-stream":
        files, options = [await request.body()], dict(request.query_params)
    else:
        received = media_type or "nothing"
        detail = f"send application/json, multipart/form-data, or an image/* file as the body, got {received!r:.80}"
        raise ProblemError(415, detail)
    if not files:
        raise ProblemError(422, "the request contains no image file", "no_images")
    if "return" in options:
        options["return"] = str(options["return"]).split(",")
    return EncodeBody(validate(EncodeRequest, options | {"images": [{"data": ""}] * len(files)}), files)


async def _read_form(request: Request, max_images: int) -> FormData:
    try:
        return await request.form(max_files=max_images, max_fields=20)
    except HTTPException as error:
        if "Too many files" in str(error.detail):
            raise ProblemError(413, f"a request may hold {max_images} images", "too_many_images") from error
        raise


def _parse_json(body: bytes) -> EncodeBody:
    request = validate(EncodeRequest, body)
    files = [_decode_base64(image.data) for image in request.images]
    for image in request.images:
        image.data = ""  # frees the encoded copy
    return EncodeBody(request, files)


def validate(schema: type[M], body: Any) -> M:
    """Returns a request body as an instance of its schema.

    Args:
        schema: The pydantic model.
        body: JSON as bytes, or the fields as a dict.

    Raises:
        ProblemError: The body does not match the schema.
    """
    try:
        return schema.model_validate_json(body) if isinstance(body, bytes) else schema.model_validate(body)
    except ValidationError as error:
        raise ProblemError(422, validation_detail(error.errors(include_input=False))) from error


def _decode_base64(text: str) -> bytes | ProblemError:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        return ProblemError(422, f"the data is not valid base64: {error}", "not_base64")


def encode_response(answer: EncodeAnswer, accept: str) -> Response:
    """Returns an encode response in the media type that the client accepts: Arrow, msgpack, or else JSON.

    Args:
        answer: The response.
        accept: The request's Accept header.
    """
    if ARROW in accept:
        fields = answer.model_dump(exclude_none=True)
        common = {"model": fields["model"], "fingerprint": fields["fingerprint"]}
        names = dict.fromkeys(name for result in fields["results"] for name in result)
        rows = [common | {name: result.get(name) for name in names} for result in fields["results"]]
        table = pa.Table.from_pylist(rows)
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return Response(sink.getvalue(), media_type=ARROW)
    if MSGPACK in accept or "application/x-msgpack" in accept:
        return Response(msgpack.packb(answer.model_dump(exclude_none=True)), media_type=MSGPACK)
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


def image_response(pixels: np.ndarray, image_format: ImageFormat, headers: dict[str, str] | None = None) -> Response:
    """Returns one image as a file, or several as a zip archive of numbered files.

    Args:
        pixels: uint8 [B, H, W, 3].
        image_format: The file format.
        headers: Additional response headers.
    """
    files = [encode_image(np.ascontiguousarray(image), image_format) for image in pixels]
    if len(files) == 1:
        return Response(files[0], media_type=f"image/{image_format}", headers=headers)
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for number, file in enumerate(files):
            archive.writestr(f"{number}.{image_format}", file)
    return Response(sink.getvalue(), media_type="application/zip", headers=headers)
