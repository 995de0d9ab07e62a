"""Bodies of requests and answers: formats and limits."""

from __future__ import annotations

import httpx
import msgpack
import pyarrow as pa
from service import assert_problem, body, photo


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


def test_bodies_with_many_mistakes_are_reported_briefly(http: httpx.Client) -> None:
    """A body with very many mistakes is refused with a short answer."""
    wrong = {"images": [{"data": ""}], "return": ["x"] * 300_000}
    assert_problem(http.post("/v1/encode", json=wrong), 422, "at most 5 items")
    assert_problem(
        http.post("/v1/decode", json={"images": [{"ids": [-1] * 300_000}]}), 422, "greater than or equal to 0"
    )


def test_bodies_without_a_length_are_bounded(http: httpx.Client) -> None:
    """Chunked bodies and forms are bounded in bytes and images."""
    pieces = (b"x" * 100_000 for _ in range(60))
    assert_problem(
        http.post("/v1/encode", content=pieces, headers={"content-type": "image/png"}), 413, "4,000,000 bytes"
    )
    pieces = (b"[" * 100_000 for _ in range(60))
    assert_problem(
        http.post("/v1/decode", content=pieces, headers={"content-type": "application/json"}), 413, "4,000,000"
    )
    many = [("image", ("a.jpg", b"x"))] * 41
    assert_problem(http.post("/v1/encode", files=many), 413, "may hold 40 images")
