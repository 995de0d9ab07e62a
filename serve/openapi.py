"""The parts of the OpenAPI document that FastAPI does not derive: bodies, media types, API keys and examples."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from serve import problems
from serve.schemas import ARROW, MSGPACK, DecodeRequest, EncodeRequest, Problem

WEIGHTS_HEADER = {"schema": {"type": "string"}, "description": "The fingerprint of the weights."}
IMAGE_TYPES = ("image/png", "image/webp", "image/jpeg")
"""Media types of images in responses."""
FILE_TYPES = (
    "image/jpeg",
    "image/png",
    "image/webp",
    "image/gif",
    "image/bmp",
    "image/tiff",
    "application/octet-stream",
)
"""Media types of image files in requests."""
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
EXAMPLE_DETAILS = {
    400: "there was an error parsing the body",
    401: "send an API key as 'Authorization: Bearer KEY'",
    403: "this service has no API keys, and therefore only accepts requests from its own machine; its operator can "
    "configure keys",
    408: "the body was not received within 30 seconds",
    413: "the body may have at most 67,108,864 bytes; send fewer or smaller images",
    415: "send application/json, multipart/form-data, or an image/* file as the body, got 'text/plain'",
    422: "this model produces 16, 32, 48, 64 tokens, by fixed, l1, mse, psnr, ssim, code, latent; got 'fixed:17'",
    429: "this API key is limited to 600 requests a minute",
    503: "server overloaded: queue is full; try again later",
}
EXAMPLE_ANSWER = {
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

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": problems.TITLES[status],
        "content": {
            "application/problem+json": {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "example": problems.problem(status, detail),
            }
        },
    }
    for status, detail in EXAMPLE_DETAILS.items()
}
for _status in (429, 503):
    PROBLEMS[_status]["headers"] = {
        "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds after which to retry the request."}
    }


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the documentation of the error responses with these statuses."""
    return {status: PROBLEMS[status] for status in statuses}


ENCODE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One result per image, in the request's order.",
        "content": {"application/json": {"example": EXAMPLE_ANSWER}, ARROW: BINARY, MSGPACK: BINARY},
    }
}
DECODE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "An image; for several images, a zip archive that contains `0.png`, `1.png` …",
        "content": dict.fromkeys((*IMAGE_TYPES, "application/zip"), BINARY),
        "headers": {"X-Alit-Weights": WEIGHTS_HEADER},
    }
}
RECONSTRUCT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "An image.",
        "content": dict.fromkeys(IMAGE_TYPES, BINARY),
        "headers": {
            "X-Alit-Tokens": {"schema": {"type": "integer"}, "description": "The number of tokens."},
            "X-Alit-Weights": WEIGHTS_HEADER,
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
                    "return": {"type": "string", "description": "Comma-separated names.", "example": "ids,trace"},
                },
            }
        },
        **dict.fromkeys(FILE_TYPES, BINARY),
    },
}
DECODE_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"$ref": "#/components/schemas/DecodeRequest"},
            "example": {"format": "png", "images": [{"ids": EXAMPLE_ANSWER["results"][0]["ids"]}]},
        }
    },
}
FILE_BODY: dict[str, Any] = {"required": True, "content": dict.fromkeys(FILE_TYPES, BINARY)}


def query_parameter(name: str, description: str, **schema: Any) -> dict[str, Any]:
    """Returns the documentation of an optional query parameter."""
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


FILE_PARAMETERS = [
    query_parameter("model", "For image file bodies; as in the JSON body.", type="string", maxLength=64),
    query_parameter("criterion", "For image file bodies; as in the JSON body.", type="string", maxLength=100),
    query_parameter("max_tokens", "For image file bodies; as in the JSON body.", type="integer", minimum=1),
    query_parameter("return", "For image file bodies; comma-separated names.", type="string"),
]


def install(app: FastAPI) -> None:
    """Completes the application's OpenAPI document with body schemas and API keys."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            modes = [(EncodeRequest, "validation"), (DecodeRequest, "validation"), (Problem, "serialization")]
            _, bodies = models_json_schema(modes, ref_template="#/components/schemas/{model}")
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(bodies["$defs"])
            components["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer", "description": "Required if the service has API keys."}
            }
            for path, operations in document["paths"].items():
                if path.startswith("/v1/"):
                    for operation in operations.values():
                        operation["security"] = [{"key": []}, {}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi
