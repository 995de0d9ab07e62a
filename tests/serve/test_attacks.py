"""Requests nobody would make by hand: drawn from the OpenAPI document, and image files broken in thousands of ways."""

from __future__ import annotations

import io
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from processes import named
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as openapi_checks
from service import KEY, Service, body, photo


@pytest.fixture(scope="module")
def api(service: Service) -> Any:
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


TAKING = ["POST /v1/encode", "POST /v1/decode", "POST /v1/reconstruct"]
GIVING = ["GET /v1/models", "GET /healthz", "GET /readyz"]
KINDS = [(operation, mode) for operation in TAKING for mode in GenerationMode]
KINDS += [(operation, GenerationMode.POSITIVE) for operation in GIVING]


@pytest.mark.parametrize(("operation", "mode"), KINDS, ids=lambda part: str(part))
def test_openapi_document_describes_every_answer(api: Any, operation: str, mode: GenerationMode) -> None:
    """Requests that the OpenAPI document allows or forbids are answered as the document describes."""
    method, path = operation.split()

    @settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        case.call_and_validate(
            headers={"Authorization": f"Bearer {KEY}"},
            checks=[
                checks.not_a_server_error,
                openapi_checks.status_code_conformance,
                openapi_checks.content_type_conformance,
                openapi_checks.response_headers_conformance,
                openapi_checks.response_schema_conformance,
            ],
        )

    ask()


def test_openapi_document_lists_every_operation(api: Any) -> None:
    """The OpenAPI document lists every operation of the service."""
    found = {operation.ok().label for operation in api.get_all_operations()}
    assert found == {*TAKING, *GIVING}


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


def test_replica_survives_two_thousand_broken_images(service: Service, http: httpx.Client) -> None:
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
