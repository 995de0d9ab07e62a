"""What the OpenAPI document says beyond what FastAPI finds by itself: bodies, other media types, keys, examples."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from serve import problems
from serve.schemas import DecodeRequest, EncodeRequest, Problem

ARROW, MSGPACK = "application/vnd.apache.arrow.stream", "application/msgpack"
WEIGHTS = {"schema": {"type": "string"}, "description": "The fingerprint of the weights."}
PICTURES = ("image/png", "image/webp", "image/jpeg")
FILES = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff", "application/octet-stream")
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
DETAILS = {
    400: "there was an error parsing the body",
    401: "send a key as 'Authorization: Bearer KEY'",
    403: "this service has no keys, and so answers on its own machine alone; its operator can give it some",
    408: "the body did not come within 30 seconds",
    413: "the body may have 67,108,864 bytes; send fewer or smaller images",
    415: "send application/json, multipart/form-data, or an image/* file as the body, got 'text/plain'",
    422: "this model gives 16, 32, 48, 64 tokens, by fixed, l1, mse, psnr, ssim, code, latent; got 'fixed:17'",
    429: "this key may make 600 requests a minute",
    503: "more waits already than can be done soon; come back later",
}
ANSWER = {
    "model": "nano",
    "fingerprint": "4dccce4752e6d368ad541d20c039ef65f1e846091f08dfa0dddd8272a81d0dfa",
    "criterion": "l1:0.08",
    "results": [
        {
            "index": 0,
            "id": "beach.jpg",
            "num_tokens": 16,
            "score": 0.0713,
            "satisfied": True,
            "width": 640,
            "height": 480,
            "ids": [2036, 1902, 1235, 1744, 984, 1298, 992, 719, 1839, 1803, 231, 630, 1311, 1199, 1719, 391],
        },
        {
            "index": 1,
            "error": problems.problem(422, "the file starts with b'junk'; expected a JPEG, PNG, …", "not_an_image"),
        },
    ],
}

FAULTS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": problems.TITLES[status],
        "content": {
            "application/problem+json": {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "example": problems.problem(status, detail),
            }
        },
    }
    for status, detail in DETAILS.items()
}
for busy in (429, 503):
    FAULTS[busy]["headers"] = {
        "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds until the same request may come again."}
    }


def faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Some of them."""
    return {status: FAULTS[status] for status in statuses}


ENCODED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One result per image, in the request's order.",
        "content": {"application/json": {"example": ANSWER}, ARROW: BINARY, MSGPACK: BINARY},
    }
}
"""By what the request accepts."""

DECODED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A picture; of several a zip file that holds `0.png`, `1.png` …",
        "content": dict.fromkeys((*PICTURES, "application/zip"), BINARY),
        "headers": {"X-Alit-Weights": WEIGHTS},
    }
}
DRAWN: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A picture.",
        "content": dict.fromkeys(PICTURES, BINARY),
        "headers": {
            "X-Alit-Tokens": {"schema": {"type": "integer"}, "description": "The code's length."},
            "X-Alit-Weights": WEIGHTS,
        },
    }
}

ENCODE_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"$ref": "#/components/schemas/EncodeRequest"},
            "example": {"criterion": "l1:0.08", "images": [{"id": "beach.jpg", "data": "/9j/4AAQSkZJRgABAQ…"}]},
        },
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {
                    "image": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}},
                    "model": {"type": "string", "maxLength": 64},
                    "criterion": {"type": "string", "maxLength": 100, "example": "l1:0.08"},
                    "max_tokens": {"type": "integer", "minimum": 1},
                    "return": {"type": "string", "description": "Names with commas between.", "example": "ids,trace"},
                },
            }
        },
        **dict.fromkeys(FILES, BINARY),
    },
}
DECODE_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"$ref": "#/components/schemas/DecodeRequest"},
            "example": {"format": "png", "images": [{"ids": ANSWER["results"][0]["ids"]}]},
        }
    },
}
FILE_BODY: dict[str, Any] = {"required": True, "content": dict.fromkeys(FILES, BINARY)}


def query(name: str, what: str, **schema: Any) -> dict[str, Any]:
    """A parameter of the request line, as a document describes it."""
    return {"name": name, "in": "query", "required": False, "description": what, "schema": schema}


RAW_OPTIONS = [
    query("model", "Where the body is a file: as in the JSON form.", type="string", maxLength=64),
    query("criterion", "Likewise.", type="string", maxLength=100),
    query("max_tokens", "Likewise.", type="integer", minimum=1),
    query("return", "Likewise, with commas between.", type="string"),
]


def install(app: FastAPI) -> None:
    """Makes the application's document whole."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            reference = "#/components/schemas/{model}"
            kinds = [(EncodeRequest, "validation"), (DecodeRequest, "validation"), (Problem, "serialization")]
            _, bodies = models_json_schema(kinds, ref_template=reference)
            components = found.setdefault("components", {})
            components.setdefault("schemas", {}).update(bodies["$defs"])
            components["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer", "description": "Where the service was given keys."}
            }
            for path, operations in found["paths"].items():
                if path.startswith("/v1/"):
                    for operation in operations.values():
                        operation["security"] = [{"key": []}, {}]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document
