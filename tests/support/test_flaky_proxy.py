"""The proxy that injects faults, between s3fs and a real S3 server."""

from __future__ import annotations

import http.client
import io
import os
import re
import socket
import time

import numpy as np
import pytest
import s3fs
from botocore.exceptions import BotoCoreError
from flaky_proxy import FlakyProxy

DATA = np.random.default_rng(0).bytes(12 << 20)


@pytest.fixture(scope="module")
def server(bucket) -> str:
    found = re.search(r"127\.0\.0\.1:\d+", bucket[0])
    assert found
    return found[0]


def client(proxy: FlakyProxy, attempts: int = 10, **config: object) -> s3fs.S3FileSystem:
    retries = {"mode": "standard", "total_max_attempts": attempts}
    return s3fs.S3FileSystem(
        key=os.environ["AWS_ACCESS_KEY_ID"],
        secret=os.environ["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=f"http://{proxy.address}",
        client_kwargs={"region_name": "us-east-1"},
        config_kwargs={"connect_timeout": 5, "read_timeout": 5, "retries": retries} | config,
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def test_proxy_without_faults_changes_nothing(bucket, server, tmp_path):
    """Without faults, every kind of request passes unchanged."""
    _, folder, _ = bucket
    with FlakyProxy(server, rate=0) as proxy:
        s3 = client(proxy, attempts=1)
        s3.pipe_file("photos/proxy/ü 1", DATA[:1000])
        s3.pipe_file("photos/proxy/empty", b"")
        s3.pipe_file("photos/proxy/large", DATA, chunksize=5 << 20)  # a multipart upload
        (tmp_path / "local").write_bytes(DATA[:70_000])
        s3.put_file(str(tmp_path / "local"), "photos/proxy/put")
        s3.call_s3("put_object", Bucket="photos", Key="proxy/expect", Body=io.BytesIO(DATA[:80_000]))  # 100-continue
        assert (folder / "proxy" / "large").read_bytes() == DATA
        assert (folder / "proxy" / "expect").read_bytes() == DATA[:80_000]
        assert s3.cat_file("photos/proxy/large") == DATA
        assert s3.cat_file("photos/proxy/large", start=5_000_000, end=9_000_001) == DATA[5_000_000:9_000_001]
        assert s3.cat_file("photos/proxy/empty") == b""
        assert s3.info("photos/proxy/put")["size"] == 70_000
        for i in range(30):  # a listing that comes in chunks
            s3.pipe_file(f"photos/proxy/{i}", b"")
        assert s3.find("photos/proxy") == sorted(f"photos/proxy/{path.name}" for path in (folder / "proxy").iterdir())
        s3.rm_file("photos/proxy/large")
        with pytest.raises(FileNotFoundError):
            s3.cat_file("photos/proxy/large", start=0, end=1)
        assert proxy.faults == {"requests": proxy.faults["requests"], "unavailable": 0, "cut": 0, "stalled": 0}
        assert proxy.faults["requests"] > 40


def test_proxy_keeps_a_connection_open(server):
    """One connection carries chunked requests and answers without a body."""
    answers = []
    with FlakyProxy(server, rate=0) as proxy:
        for address in (server, proxy.address):
            connection = http.client.HTTPConnection(address, timeout=5)
            for method, body in (("PUT", iter([DATA[:50_000], b"0\r\n\r\n"])), ("HEAD", None), ("GET", None)):
                connection.request(method, "/photos/unsigned", body)
                response = connection.getresponse()
                answers.append((response.status, bool(response.read())))
            connection.close()
        assert proxy.faults["requests"] == 3
    assert answers[:3] == answers[3:]
    assert [has_body for _, has_body in answers[:3]] == [True, False, True]


def test_proxy_faults_do_not_corrupt_reads(server):
    """Reads that are retried through faults give the right bytes."""
    with FlakyProxy(server, rate=0, stall=0.75) as proxy:
        s3 = client(proxy, attempts=3, read_timeout=0.5, max_pool_connections=50)
        s3.retries = 10  # of bodies, which botocore does not retry; of a hundred, one may fail five times in a row
        for i in range(10):
            s3.pipe_file(f"photos/read/{i}", DATA[i : i + 300_000])
        proxy.rate = 0.3
        starts = list(range(0, 300_000, 3000))
        paths = [f"photos/read/{i % 10}" for i in range(len(starts))]
        got = s3.cat_ranges(paths, starts, [start + 2000 for start in starts], batch_size=50)
        assert got == [DATA[i % 10 + start :][:2000] for i, start in enumerate(starts)]
        assert sorted(s3.find("photos/read")) == sorted(f"photos/read/{i}" for i in range(10))
        assert min(proxy.faults.values()) > 5
        proxy.rate = 0


def test_proxy_cuts_answers_after_the_write(bucket, server):
    """A write whose answer is lost is stored all the same."""
    _, folder, _ = bucket
    with FlakyProxy(server, rate=1, stall=0.1) as proxy:
        s3 = client(proxy, attempts=1)
        s3.retries = 1
        for i in range(12):
            refused = proxy.faults["requests"] - proxy.faults["unavailable"]
            with pytest.raises((OSError, BotoCoreError)):
                s3.pipe_file(f"photos/unheard/{i}", DATA[:1000])
            reached = proxy.faults["requests"] - proxy.faults["unavailable"] > refused
            assert (folder / "unheard" / f"{i}").exists() == reached
        assert all(proxy.faults.values())


def test_proxy_read_only_refuses_writes_alone(bucket, server):
    """A read-only bucket refuses writes and answers reads."""
    _, folder, _ = bucket
    with FlakyProxy(server, rate=0) as proxy:
        s3 = client(proxy)
        s3.pipe_file("photos/kept", b"1")
        proxy.read_only = True
        for write in (
            lambda: s3.pipe_file("photos/kept", DATA[:1_000_000]),
            lambda: s3.pipe_file("photos/kept", DATA, chunksize=5 << 20),
            lambda: s3.rm_file("photos/kept"),
            lambda: s3.rm("photos/kept"),
        ):
            with pytest.raises(PermissionError):
                write()
        assert s3.cat_file("photos/kept") == b"1"
        proxy.read_only = False
        s3.pipe_file("photos/kept", b"2")
        assert (folder / "kept").read_bytes() == b"2"


def test_proxy_stops_with_open_connections(server):
    """The proxy stops at once while connections are open."""
    with FlakyProxy(server, rate=1, stall=60, seed=1) as proxy:
        host, port = proxy.address.split(":")
        connections = [socket.create_connection((host, int(port))) for _ in range(200)]
        for connection in connections[:100]:
            connection.sendall(b"GET /photos/ HTTP/1.1\r\nHost: x\r\n\r\n")
        while proxy.faults["requests"] < 100:
            time.sleep(0.01)
        start = time.monotonic()
    assert time.monotonic() - start < 2
    assert proxy.faults["stalled"] > 10
    for connection in connections:
        connection.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))
