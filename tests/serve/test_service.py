"""The service as a whole, on a real Ray Serve that `alit serve` starts once."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import random
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from paths import ROOT
from PIL import Image
from processes import named
from rich.console import Console
from service import KEY, Service, body, encode_alone, photo

from alit.dataset import TokenDataset
from alit.weights import Weights
from jobs.tokenization.job import tokenize
from jobs.tokenization.options import TokenizeOptions
from serve.client import AsyncClient


def photographs(request: pytest.FixtureRequest) -> list[bytes]:
    """Returns 200 of the photographs beside the checkout, or generated images."""
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
        alone = encode_alone(weights, files[number], others[number % 3])
        assert result["ids"] == alone.tokens.tolist(), number


def test_documented_requests_work(service: Service, tmp_path: Path) -> None:
    """The requests that docs/serve.md and the README show work as they stand."""
    text = (ROOT / "docs" / "serve.md").read_text()
    section = text[text.index("## Requests") : text.index("## Load")]
    (tmp_path / "photo.jpg").write_bytes(photo(3))
    (tmp_path / "other.png").write_bytes(photo(4))
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "python"]
    assert blocks[0][1] in (ROOT / "README.md").read_text()
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


def seeds() -> list[bytes]:
    """Small whole files of every kind that is taken."""
    picture = Image.open(io.BytesIO(photo(5, 48)))
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("JPEG", "RGB", {}),
        ("JPEG", "CMYK", {"progressive": True}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("GIF", "P", {"save_all": True, "append_images": [picture.convert("P").rotate(90)]}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "I;16", {}),
        ("BMP", "RGB", {}),
    ]
    files = []
    for kind, mode, options in kinds:
        file = io.BytesIO()
        converted = picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)
        converted.save(file, kind, **options)
        files.append(file.getvalue())
    return files


def broken(file: bytes, random: np.random.Generator) -> bytes:
    """A file with some bytes changed, lost, doubled or put elsewhere."""
    data = bytearray(file)
    for _ in range(random.integers(1, 6)):
        at, size = int(random.integers(0, len(data))), int(random.integers(1, 40))
        match random.integers(0, 6):
            case 0:
                data[at] = int(random.integers(0, 256))
            case 1:
                data[at] ^= 1 << int(random.integers(0, 8))
            case 2:
                data[at : at + size] = b""
            case 3:
                data[at:at] = data[at : at + size]
            case 4:
                data[at : at + size] = random.bytes(size)
            case _:  # fields of sizes and counts
                data[at : at + 4] = random.choice([b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"])
        if not data:
            return b""
    return bytes(data[: random.integers(0, len(data))] if random.random() < 0.1 else data)


def test_service_survives_two_thousand_broken_images(service: Service, http: httpx.Client) -> None:
    """Two thousand broken images give results or client errors, and no replica is replaced."""
    random = np.random.default_rng(0)
    whole = seeds()
    before = sorted(named(service.process.pid, "ServeReplica:alit:"))
    refused, number = set(), 0
    while number < 2000:
        files = [broken(whole[(number + i) % len(whole)], random) for i in range(40)]
        answer = http.post("/v1/encode", json=body(*files, criterion="fixed:16"))
        assert answer.status_code == 200, answer.text
        results = answer.json()["results"]
        assert [result["index"] for result in results] == list(range(40))
        for result in results:
            assert ("error" in result) != (len(result.get("ids", [])) == 16)
            if "error" in result:
                assert 400 <= result["error"]["status"] < 500
                refused.add(result["error"]["type"].rpartition(":")[2])
        number += 40
    assert len(refused) >= 4, refused  # the breakages are of several kinds
    assert sorted(named(service.process.pid, "ServeReplica:alit:")) == before
