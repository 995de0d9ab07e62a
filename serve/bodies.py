"""Request bodies in, answer bodies out: JSON, multipart and files; JSON, Arrow, msgpack and pictures."""

from __future__ import annotations

import base64
import binascii
import io
import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack
import numpy as np
import pyarrow as pa
from fastapi import Request, Response
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from alit.images.encode import encode_image
from serve.openapi import ARROW, MSGPACK
from serve.problems import ProblemError
from serve.schemas import EncodeAnswer, EncodeRequest, ImageFormat

if TYPE_CHECKING:
    from serve.service import Api

M = TypeVar("M", bound=BaseModel)


async def read_request(request: Request, api: Api) -> tuple[EncodeRequest, Sequence[bytes | ProblemError]]:
    """The options and files of a request: JSON, multipart, or an image file as the body with options in the query."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await api.off_loop(_from_json, await request.body())
    if kind == "multipart/form-data":
        most = api.settings.max_images
        try:
            form: FormData = await request.form(max_files=most, max_fields=20)
        except HTTPException as error:
            if "Too many files" in str(error.detail):
                raise ProblemError(413, f"a request may hold {most} images", "too_many_images") from error
            raise
        files = [await item.read() for _, item in form.multi_items() if not isinstance(item, str)]
        options: dict[str, Any] = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    elif kind.startswith("image/") or kind == "application/octet-stream":
        files, options = [await request.body()], dict(request.query_params)
    else:
        detail = (
            f"send application/json, multipart/form-data, or an image/* file as the body, got {kind or 'nothing'!r:.80}"
        )
        raise ProblemError(415, detail)
    if not files:
        raise ProblemError(422, "the request holds no image file", "no_images")
    if "return" in options:
        options["return"] = str(options["return"]).split(",")
    return checked(EncodeRequest, options | {"images": [{"data": ""}] * len(files)}), files


def _from_json(body: bytes) -> tuple[EncodeRequest, Sequence[bytes | ProblemError]]:
    found = checked(EncodeRequest, body)
    files = [from_base64(image.data) for image in found.images]
    for image in found.images:
        image.data = ""  # not to be held twice
    return found, files


def checked(kind: type[M], given: Any) -> M:
    """A request from its JSON, or from its fields.

    Raises:
        ProblemError: it has another shape.
    """
    try:
        return kind.model_validate_json(given) if isinstance(given, bytes) else kind.model_validate(given)
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
    if ARROW in accept:
        told = answer.model_dump(exclude_none=True)
        common = {"model": told["model"], "fingerprint": told["fingerprint"]}
        names = dict.fromkeys(name for result in told["results"] for name in result)
        rows = [common | {name: result.get(name) for name in names} for result in told["results"]]
        table = pa.Table.from_pylist(rows)
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return Response(sink.getvalue(), media_type=ARROW)
    if MSGPACK in accept or "application/x-msgpack" in accept:
        return Response(msgpack.packb(answer.model_dump(exclude_none=True)), media_type=MSGPACK)
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


def pictures(pixels: np.ndarray, format: ImageFormat, headers: dict[str, str] | None = None) -> Response:
    files = [encode_image(np.ascontiguousarray(image), format) for image in pixels]
    if len(files) == 1:
        return Response(files[0], media_type=f"image/{format}", headers=headers)
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for number, file in enumerate(files):
            archive.writestr(f"{number}.{format}", file)
    return Response(sink.getvalue(), media_type="application/zip", headers=headers)
