"""The API over real HTTP, on a real Ray Serve that `alit serve` starts once."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import random
import re
import socket
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from paths import CLUSTER
from PIL import Image
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema
from rich.console import Console
from service import KEY, Service, body, photo

from alit.dataset import TokenDataset
from alit.images.decode import decode_image
from alit.images.encode import to_uint8
from alit.weights import Weights
from jobs.tokenization.job import tokenize
from jobs.tokenization.options import TokenizeOptions
from serve.access import AccessMiddleware
from serve.app import build
from serve.client import AsyncClient, Client, ServiceError
from serve.settings import ListenAddress, Settings, read_settings


def expected(weights: Weights, file: bytes, criterion: str) -> Any:
    pixels = decode_image(file, weights.model.config.image_size).pixels
    return weights.model.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None], criterion)


# -------------------------------------------------------------------- what is answered


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
        result, alone = answer["results"][i], expected(weights, files[i], "l1:0.05")
        assert result["ids"] == alone.tokens.tolist()
        assert result["score"] == pytest.approx(alone.score.item(), abs=1e-5)
        assert result["satisfied"] == alone.satisfied.item()
        assert result["trace"] == pytest.approx(alone.trace[0, : alone.tried.item()].tolist(), abs=1e-5)
        assert (result["width"], result["height"]) == (80, 80 + (0, 0, 1)[i])
    assert answer["results"][2]["id"] == "two"
    assert answer["results"][1]["error"]["type"] == "urn:alit:problem:not_an_image"
    assert answer["results"][3]["error"]["type"] == "urn:alit:problem:empty"


def test_encode_accepts_raw_and_multipart_bodies(http: httpx.Client) -> None:
    """Raw bodies and multipart forms give the same results as JSON."""
    told = http.post("/v1/encode", json=body(photo(3), criterion="fixed:32")).json()["results"]
    raw = http.post("/v1/encode?criterion=fixed:32", content=photo(3), headers={"content-type": "image/jpeg"}).json()
    several = [("image", ("a.jpg", photo(3))), ("image", ("b.jpg", photo(4)))]
    form = http.post("/v1/encode", files=several, data={"criterion": "fixed:32", "return": "ids,trace"}).json()
    assert raw["results"] == told
    assert form["results"][0]["ids"] == told[0]["ids"]
    assert len(form["results"]) == 2


def test_encode_answers_in_arrow_and_msgpack(http: httpx.Client) -> None:
    """Arrow and MessagePack answers hold the content of the JSON answer."""
    asked = body(photo(5), b"bad", criterion="l1:0.05")
    told = http.post("/v1/encode", json=asked).json()
    packed = http.post("/v1/encode", json=asked, headers={"accept": "application/msgpack"})
    assert msgpack.unpackb(packed.content) == told
    stream = http.post("/v1/encode", json=asked, headers={"accept": "application/vnd.apache.arrow.stream"})
    rows = pa.ipc.open_stream(stream.content).read_all().to_pylist()
    assert rows[0]["ids"] == told["results"][0]["ids"]
    assert rows[1]["error"]["status"] == 422
    assert rows[0]["fingerprint"] == told["fingerprint"]


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
    rows = [expected(weights, photo(i), f"fixed:{16 * (i + 1)}").tokens for i in range(3)]
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


def photographs(request: pytest.FixtureRequest) -> list[bytes]:
    """200 of the real ones beside the checkout, or pictures made up."""
    try:
        table = request.getfixturevalue("shared") / "data/photos-136/val-00000.parquet"
    except pytest.skip.Exception:
        return [photo(i, 70) for i in range(200)]
    return pq.read_table(table, columns=["image"])["image"].slice(0, 200).to_pylist()


def test_service_agrees_with_the_tokenize_job(
    service: Service, weights: Weights, request: pytest.FixtureRequest, ray_session: None, tmp_path: Path
) -> None:
    """Two hundred images in mixed, concurrent requests have the tokens that the job writes."""
    files = photographs(request)
    pq.write_table(pa.table({"image": files, "id": [str(i) for i in range(200)]}), tmp_path / "photos.parquet")
    job = TokenizeOptions(criterion="l1:0.07", image_column="image", id_column="id")
    tokenize(str(tmp_path / "photos.parquet"), str(tmp_path / "tokens"), job, Console(file=io.StringIO()))
    rows = {row["id"]: row for row in TokenDataset(tmp_path / "tokens").table().to_pylist()}
    others = ["fixed:16", "psnr:18", "ssim:0.4"]

    async def ask() -> tuple[dict[int, Any], dict[int, Any]]:
        same: dict[int, Any] = {}
        other: dict[int, Any] = {}
        async with AsyncClient(service.url, KEY, tries=20) as client:

            async def one(numbers: list[int], criterion: str, found: dict[int, Any]) -> None:
                results = await client.encode([files[n] for n in numbers], criterion=criterion)
                found.update(zip(numbers, results, strict=True))

            starts = [*range(40), *range(40, 80, 2), *range(80, 200, 15)]
            chunks = [list(range(a, b)) for a, b in itertools.pairwise([*starts, 200])]
            asked = [one(chunk, "l1:0.07", same) for chunk in chunks]
            asked += [one([n], others[n % 3], other) for n in range(60)]
            random.Random(0).shuffle(asked)
            await asyncio.gather(*asked)
        return same, other

    same, other = asyncio.run(ask())
    assert sorted(same) == list(range(200))
    assert len({result["num_tokens"] for result in same.values()}) > 1
    for number, result in same.items():
        row = rows[str(number)]
        assert (result["ids"], result["num_tokens"]) == (row["tokens"], row["num_tokens"]), number
        assert result["score"] == pytest.approx(row["score"], abs=1e-5)
        assert result["satisfied"] == row["satisfied"]
    for number, result in other.items():
        alone = expected(weights, files[number], others[number % 3])
        assert result["ids"] == alone.tokens.tolist(), number


def test_readme_commands_for_serving_work(service: Service, tmp_path: Path) -> None:
    """The README's commands for serving work as they stand."""
    text = (CLUSTER.parent / "README.md").read_text()
    section = text[text.index("## Serving") : text.index("## Python")]
    (tmp_path / "photo.jpg").write_bytes(photo(3))
    (tmp_path / "other.png").write_bytes(photo(4))
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "python"]
    shell, python = (block.replace("http://127.0.0.1:8000", service.url) for _, block in blocks)
    answers = []
    for line in shell.splitlines():
        command = line.replace("curl ", f"curl -sf -H 'Authorization: Bearer {KEY}' ", 1)
        ran = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, check=True)
        answers.append(ran.stdout)
    assert len(json.loads(answers[0])["results"][0]["ids"]) in (16, 32, 48, 64)
    assert [len(result["trace"]) > 0 for result in json.loads(answers[1])["results"]] == [True, True]
    assert Image.open(io.BytesIO((tmp_path / "reconstruction.png").read_bytes())).size == (64, 64)
    code = python.replace(f'Client("{service.url}")', f'Client("{service.url}", "{KEY}")')
    code += "\nassert png.startswith(b'\\x89PNG')\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# -------------------------------------------------------------------- access control


def problem(response: httpx.Response, status: int, words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    told = response.json()
    assert told.keys() == {"type", "title", "status", "detail"}
    assert told["status"] == status
    assert words in told["detail"]


def test_access_requires_a_known_key(service: Service) -> None:
    """Without a known key, requests are refused with 401, and the log holds no key."""
    asked = body(photo(0))
    with httpx.Client(base_url=service.url) as stranger:
        problem(stranger.post("/v1/encode", json=asked), 401, "Authorization: Bearer KEY")
        wrong = stranger.post("/v1/encode", json=asked, headers={"Authorization": "Bearer " + "x" * 30})
        problem(wrong, 401, "unknown API key")
        assert wrong.headers["www-authenticate"].startswith("Bearer")
        problem(stranger.get("/v1/models"), 401, "key")
        assert stranger.get("/healthz").is_success
        assert stranger.get("/").headers["content-security-policy"].startswith("default-src 'self'")
    assert KEY not in service.log.read_text()


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
    problem(http.post("/v1/encode", **content), status, words)
    assert http.post("/v1/encode", json=body(photo(0))).is_success


def test_bodies_with_many_mistakes_are_reported_briefly(http: httpx.Client) -> None:
    """A body with very many mistakes is refused with a short answer."""
    wrong = {"images": [{"data": ""}], "return": ["x"] * 300_000}
    problem(http.post("/v1/encode", json=wrong), 422, "at most 5 items")
    problem(http.post("/v1/decode", json={"images": [{"ids": [-1] * 300_000}]}), 422, "greater than or equal to 0")


def test_reconstruct_refuses_impossible_lengths(http: httpx.Client) -> None:
    """A number of tokens that the model does not have is a problem document."""
    for tokens in ("9" * 150, "-1", "17", "x"):
        answer = http.post(f"/v1/reconstruct?tokens={tokens}", content=photo(0))
        problem(answer, 422, "tokens")


def test_access_ignores_timeout_headers_of_clients(http: httpx.Client) -> None:
    """Headers about timeouts that Ray Serve would obey have no effect."""
    headers = {"x-request-timeout-seconds": "0", "x-request-disconnect-disabled": "?1"}
    assert http.post("/v1/encode", json=body(photo(0)), headers=headers).is_success


def test_bodies_without_a_length_are_bounded(http: httpx.Client) -> None:
    """Chunked bodies and forms are bounded in bytes and images."""
    pieces = (b"x" * 100_000 for _ in range(60))
    problem(http.post("/v1/encode", content=pieces, headers={"content-type": "image/png"}), 413, "4,000,000 bytes")
    pieces = (b"[" * 100_000 for _ in range(60))
    problem(http.post("/v1/decode", content=pieces, headers={"content-type": "application/json"}), 413, "4,000,000")
    many = [("image", ("a.jpg", b"x"))] * 41
    problem(http.post("/v1/encode", files=many), 413, "may hold 40 images")


def test_access_logs_every_request(service: Service, http: httpx.Client) -> None:
    """Every request is one line of the log, with the key's name and without the key."""
    http.post("/v1/encode?criterion=nonsense:1", content=photo(0), headers={"content-type": "image/jpeg"})
    lines = [line for line in service.requests() if line["status"] == 422 and line["path"] == "/v1/encode"]
    assert lines
    assert (lines[-1]["method"], lines[-1]["key"]) == ("POST", "tests")
    assert lines[-1]["seconds"] >= 0
    assert lines[-1]["request_id"]
    assert not any(KEY in str(line) for line in service.requests())


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
    problem(http.post("/v1/decode", json=asked), 422, words)


def test_unknown_paths_are_problem_documents(http: httpx.Client) -> None:
    """Unknown paths and methods are problem documents, and no file outside the playground is served."""
    problem(http.get("/v2/encode"), 404, "Not Found")
    problem(http.get("/v1/encode"), 405, "Method Not Allowed")
    for path in ("/playground/../app.py", "/playground/%2e%2e/app.py", "/playground/..%2fapp.py"):
        assert http.get(path).status_code in (404, 405)


async def answers(scope: Any, receive: Any, send: Any) -> None:
    """An application behind the middleware that responds with an empty object."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def test_access_limits_the_rate_of_each_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key has its own request rate, and a refused request has a Retry-After header."""
    monkeypatch.setenv("ALIT_KEYS", f"one:{KEY},two:{KEY[::-1]}")

    async def ask() -> None:
        settings = Settings(requests_per_minute=30)  # five at once, then one every two seconds
        middleware = AccessMiddleware(answers, settings)
        transport = httpx.ASGITransport(middleware)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            one, two = ({"Authorization": f"Bearer {key}"} for key in (KEY, KEY[::-1]))
            statuses = [(await client.get("/v1/models", headers=one)).status_code for _ in range(7)]
            assert statuses == [200] * 5 + [429] * 2
            refused = await client.get("/v1/models", headers=one)
            problem(refused, 429, "30 requests a minute")
            assert 1 <= int(refused.headers["retry-after"]) <= 3
            assert (await client.get("/v1/models", headers=two)).status_code == 200

    asyncio.run(ask())


def test_access_without_keys_answers_this_host_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without keys, only requests from this host are answered, unless the settings allow others."""
    monkeypatch.delenv("ALIT_KEYS", raising=False)

    async def statuses(settings: Settings) -> list[int]:
        found = []
        for host in ("127.0.0.1", "[::1]", "192.0.2.7"):
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(AccessMiddleware(answers, settings)), base_url=f"http://{host}"
            ) as client:
                found.append((await client.get("/v1/models")).status_code)
        return found

    assert asyncio.run(statuses(Settings())) == [200, 200, 403]
    assert asyncio.run(statuses(Settings(keyless=True))) == [200, 200, 200]
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")  # which comes from its own machine, whoever comes to it
    assert asyncio.run(statuses(Settings())) == [403, 403, 403]


def test_client_returns_results_and_raises_errors(service: Service) -> None:
    """The client returns the service's results and raises its errors."""
    with Client(service.url, KEY) as client:
        good, bad = client.encode([photo(0), b"junk"], criterion="fixed:16")
        assert len(good["ids"]) == 16
        assert "expected a JPEG" in bad["error"]["detail"]
        assert len(client.decode([good["ids"]])) == 1
        assert len(client.decode([good["ids"]] * 2, format="webp")) == 2
        assert client.models()["default"] == "nano"
        with pytest.raises(ServiceError, match="there is no model") as caught:
            client.encode([photo(0)], model="absent")
        assert caught.value.status == 422
    with Client(service.url, "x" * 20, tries=1) as stranger, pytest.raises(ServiceError, match="unknown API key"):
        stranger.models()


def test_client_imports_neither_torch_nor_ray() -> None:
    """The client imports neither torch nor Ray."""
    code = "import sys, serve.client; sys.exit(bool({'torch', 'ray', 'alit', 'fastapi'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_service_survives_slow_and_leaving_clients(service: Service, http: httpx.Client) -> None:
    """Clients that leave or send slowly do not disturb other requests."""
    head = f"POST /v1/encode HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: image/png\r\n"
    slow = socket.create_connection(("127.0.0.1", service.port))
    slow.sendall(f"{head}Content-Length: 1000\r\n\r\nabc".encode())
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", service.port)) as gone:
            gone.sendall(f"{head}Content-Length: {len(photo(0))}\r\n\r\n".encode() + photo(0))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: http.post("/v1/encode", json=body(photo(0))), range(8)))
    assert all(answer.is_success for answer in answers)
    slow.close()


def test_service_refuses_malformed_http(service: Service, http: httpx.Client) -> None:
    """Malformed HTTP requests are refused, and the service keeps answering."""
    smuggled = [
        b"POST /v1/encode HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST /v1/encode HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/encode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
    ]
    for request in smuggled:
        with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
            connection.sendall(request)
            answer = connection.recv(1000)
            assert answer == b"" or int(answer.split()[1]) in (400, 401, 413, 501), (request, answer)
    assert http.get("/healthz").is_success


# -------------------------------------------------------------------- the command


def test_settings_example_holds_every_default() -> None:
    """The example file holds every setting with its default."""
    example = CLUSTER / "serve.yaml"
    assert read_settings(example, {}) == (Settings(), ListenAddress())
    assert set(yaml.safe_load(example.read_text())) == set(Settings.model_fields) | set(ListenAddress.model_fields)


@pytest.mark.parametrize("size", ["cpu", "gpu", "multi-gpu"])
def test_app_builds_from_every_example_config(size: str) -> None:
    """Ray Serve and our settings accept the example configuration of every size."""
    found = yaml.safe_load((CLUSTER / f"serve-{size}.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(found).applications
    assert application.import_path == "serve.app:build"
    settings = Settings(**application.args)
    assert found["http_options"]["request_timeout_s"] > settings.deadline_seconds
    built = call_user_app_builder_with_args_if_necessary(build, application.args)
    assert built._bound_deployment.name == "Ingress"


def test_application_can_be_built_by_serve(tmp_path: Path) -> None:
    """The command `serve build` writes the default application."""
    command = [str(Path(sys.executable).with_name("serve")), "build", "serve.application:application"]
    subprocess.run([*command, "-o", str(tmp_path / "built.yaml")], cwd=tmp_path, check=True, capture_output=True)
    found = yaml.safe_load((tmp_path / "built.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(found).applications
    assert application.import_path == "serve.application:application"
    assert [deployment.name for deployment in application.deployments] == ["Encoder", "Ingress"]


def test_serve_command_refuses_bad_settings(tmp_path: Path) -> None:
    """Bad settings end `alit serve` with one sentence and exit code 2."""
    (tmp_path / "short").write_text("me:short\n")
    (tmp_path / "typo.yaml").write_text("max_imgs: 3\n")
    (tmp_path / "range.yaml").write_text("deadline_seconds: -1\n")
    cases = {
        "without API keys the service only listens on this machine": ["--host", "0.0.0.0"],
        "must be written name:key": ["--keys-file", tmp_path / "short"],
        "max_imgs: Extra inputs are not permitted": ["--config", tmp_path / "typo.yaml"],
        "deadline_seconds: Input should be greater than 0": ["--config", tmp_path / "range.yaml"],
        "cannot be read as YAML": ["--config", tmp_path / "absent.yaml"],
        "no weights in": ["--weights", "x", tmp_path / "absent"],
    }
    running = {}
    for words, arguments in cases.items():
        command = [str(Path(sys.executable).with_name("alit")), "serve", *map(str, arguments)]
        running[words] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for words, process in running.items():
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2, said
        assert words in said, said
        assert said.startswith("alit: ")
        assert "Traceback" not in said
