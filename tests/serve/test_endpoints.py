"""The endpoints over real HTTP."""

from __future__ import annotations

import base64
import io
import zipfile
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from service import assert_problem, body, encode_alone, photo

from alit.images.decode import decode_image
from alit.images.encode import to_uint8
from alit.weights import Weights


def test_models_and_health_endpoints_answer(http: httpx.Client, weights: Weights) -> None:
    """The endpoints of models, health, readiness and the OpenAPI document answer."""
    (model,) = http.get("/v1/models").raise_for_status().json()["models"]
    assert (model["name"], model["fingerprint"], model["lengths"]) == ("nano", weights.fingerprint, [16, 32, 48, 64])
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"status": "ready"}
    assert http.get("/openapi.json").json()["paths"].keys() >= {"/v1/encode", "/v1/decode", "/v1/reconstruct"}


def test_encode_answers_every_image_in_order(http: httpx.Client, weights: Weights) -> None:
    """Every image of a request has its result or its error, in order."""
    files = [photo(0), b"no picture", photo(1), b""]
    asked = body(*files, criterion="l1:0.05", **{"return": ["ids", "trace"]})
    asked["images"][2]["id"] = "two"
    answer = http.post("/v1/encode", json=asked).raise_for_status().json()
    assert answer["fingerprint"] == weights.fingerprint
    assert [result["index"] for result in answer["results"]] == [0, 1, 2, 3]
    for i in (0, 2):
        result, alone = answer["results"][i], encode_alone(weights, files[i], "l1:0.05")
        assert result["ids"] == alone.tokens.tolist()
        assert result["score"] == pytest.approx(alone.score.item(), abs=1e-5)
        assert result["satisfied"] == alone.satisfied.item()
        assert result["trace"] == pytest.approx(alone.trace[0, : alone.tried.item()].tolist(), abs=1e-5)
        assert (result["width"], result["height"]) == (80, 80 + (0, 0, 1)[i])
    assert answer["results"][2]["id"] == "two"
    assert answer["results"][1]["error"]["type"] == "urn:alit:problem:not_an_image"
    assert answer["results"][3]["error"]["type"] == "urn:alit:problem:empty"


def test_encode_respects_max_tokens(http: httpx.Client) -> None:
    """The option max_tokens bounds the length of the code."""
    (result,) = http.post("/v1/encode", json=body(photo(6), criterion="l1:0", max_tokens=40)).json()["results"]
    assert (result["num_tokens"], result["satisfied"]) == (32, False)


def test_encode_returns_every_length_and_attention(http: httpx.Client, weights: Weights) -> None:
    """Every length, the attention maps and reconstructions are returned on request."""
    asked = body(photo(7), **{"return": ["every_length", "attention", "reconstruction"]})
    (result,) = http.post("/v1/encode", json=asked).json()["results"]
    assert [length["num_tokens"] for length in result["every_length"]] == [16, 32, 48, 64]
    pixels = decode_image(photo(7), 64).pixels
    every = weights.model.encode_all(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    for length, ids in zip(result["every_length"], every, strict=True):
        assert length["ids"] == ids[0].tolist()
        drawn = np.array(Image.open(io.BytesIO(base64.b64decode(length["reconstruction"]))))
        assert np.abs(drawn.astype(int) - to_uint8(weights.model.decode(list(ids)))[0]).max() <= 1
        assert length["l1"] == pytest.approx(np.abs(drawn / 255 - pixels / 255).mean(), abs=2e-3)
    for maps in result["attention"]:
        assert len(base64.b64decode(maps["maps"])) == maps["num_tokens"] * maps["grid"] ** 2
    assert "ids" not in result


def test_decode_returns_images(http: httpx.Client, weights: Weights) -> None:
    """Ids are decoded to images in an archive or a single file, and reconstruct does both steps."""
    rows = [encode_alone(weights, photo(i), f"fixed:{16 * (i + 1)}").tokens for i in range(3)]
    asked = {"images": [{"ids": row.tolist()} for row in rows], "fingerprint": weights.fingerprint}
    answer = http.post("/v1/decode", json=asked)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.namelist() == ["0.png", "1.png", "2.png"]
        drawn = [np.array(Image.open(archive.open(name))).astype(int) for name in archive.namelist()]
    for picture, row in zip(drawn, rows, strict=True):
        assert np.abs(picture - to_uint8(weights.model.decode([row]))[0]).max() <= 1
    assert answer.headers["x-alit-weights"] == weights.fingerprint
    for kind in ("png", "webp", "jpeg"):
        one = http.post("/v1/decode", json={"images": asked["images"][:1], "format": kind})
        assert Image.open(io.BytesIO(one.content)).format == kind.upper()
    there_and_back = http.post("/v1/reconstruct?tokens=48", content=photo(0))
    assert there_and_back.headers["x-alit-tokens"] == "48"
    assert Image.open(io.BytesIO(there_and_back.content)).size == (64, 64)


MISTAKES: list[tuple[dict[str, Any], int, str]] = [
    ({"json": {"images": []}}, 422, "images"),
    ({"json": body(b"x", model="large")}, 422, "there is no model 'large'; there are nano"),
    ({"json": body(b"x", criterion="beauty:1")}, 422, "is not known; write fixed:N"),
    ({"json": body(b"x", criterion="l1:nan")}, 422, "must lie from 0 to 1, got nan"),
    ({"json": body(b"x", criterion="os:system@1")}, 422, "is not known"),
    ({"json": body(b"x", criterion="fixed:17")}, 422, "produces 16, 32, 48, 64 tokens"),
    ({"json": body(b"x", max_tokens=3)}, 422, "max_tokens must be at least 16"),
    ({"json": body(b"x", colour="red")}, 422, "colour"),
    ({"json": body(*[b"x"] * 41)}, 413, "may hold 40 images, got 41"),
    ({"json": [1, 2]}, 422, "should be an object"),
    ({"content": b"{", "headers": {"content-type": "application/json"}}, 422, "Invalid JSON"),
    ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "send application/json"),
    ({"content": b"x" * 4_000_001, "headers": {"content-type": "image/png"}}, 413, "4,000,000 bytes"),
    ({"data": {"criterion": "l1:0.1"}}, 415, "x-www-form-urlencoded"),
]


@pytest.mark.parametrize(("content", "status", "words"), MISTAKES)
def test_encode_reports_mistakes_as_problem_documents(
    http: httpx.Client, content: dict[str, Any], status: int, words: str
) -> None:
    """A mistake in a request is a problem document, and the service keeps answering."""
    assert_problem(http.post("/v1/encode", **content), status, words)
    assert http.post("/v1/encode", json=body(photo(0))).is_success


def test_reconstruct_refuses_impossible_lengths(http: httpx.Client) -> None:
    """A number of tokens that the model does not have is a problem document."""
    for tokens in ("9" * 150, "-1", "17", "x"):
        answer = http.post(f"/v1/reconstruct?tokens={tokens}", content=photo(0))
        assert_problem(answer, 422, "tokens")


def test_encode_refuses_images_beyond_the_limits(http: httpx.Client) -> None:
    """Images above the limits of pixels or bytes are refused one by one."""
    bomb = io.BytesIO()
    Image.new("1", (4000, 3000)).save(bomb, "png")
    answer = http.post("/v1/encode", json=body(bomb.getvalue(), b"\xff\xd8\xff" + b"x" * 1_000_000, photo(0))).json()
    reasons = [result.get("error", {}).get("type") for result in answer["results"]]
    assert reasons == ["urn:alit:problem:too_many_pixels", "urn:alit:problem:too_many_bytes", None]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"images": [{"ids": [1] * 17}]}, "images.0: this model decodes 16, 32, 48, 64 tokens, got 17"),
        ({"images": [{"ids": [2048] * 16}]}, "ids must be between 0 and 2047, got 2048"),
        ({"images": [{"ids": [-1] * 16}]}, "greater than or equal to 0"),
        ({"images": [{"ids": ["a"] * 16}]}, "valid integer"),
        ({"images": [{"ids": [1] * 16}], "fingerprint": "abc"}, "has the weights"),
        ({"images": [{"ids": [1] * 16}], "format": "tiff"}, "'png', 'webp' or 'jpeg'"),
    ],
)
def test_decode_reports_mistakes_as_problem_documents(http: httpx.Client, asked: dict[str, Any], words: str) -> None:
    """Ids, fingerprints and formats that are not possible are problem documents."""
    assert_problem(http.post("/v1/decode", json=asked), 422, words)


def test_unknown_paths_are_problem_documents(http: httpx.Client) -> None:
    """Unknown paths and methods are problem documents, and no file outside the playground is served."""
    assert_problem(http.get("/v2/encode"), 404, "Not Found")
    assert_problem(http.get("/v1/encode"), 405, "Method Not Allowed")
    for path in ("/playground/../app.py", "/playground/%2e%2e/app.py", "/playground/..%2fapp.py"):
        assert http.get(path).status_code in (404, 405)
