"""The service while its processes are killed, replaced and overloaded."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from processes import named
from service import KEY, SETTINGS, Service, body, photo
from small_models import SMALLEST

from alit.images.decode import decode_image
from alit.tokenizer import Alit
from alit.weights import load_weights, save_weights
from serve.client import Client

HEADERS = {"Authorization": f"Bearer {KEY}"}
BODY = body(*[photo(i) for i in range(8)], criterion="l1:0")


class Clients:
    """Threads that ask again and again until they are stopped, and tell of every answer."""

    def __init__(self, ask: Callable[[], Any], count: int = 4) -> None:
        self.ended, self.found = threading.Event(), []
        self.threads = [threading.Thread(target=self._go, args=(ask,)) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def _go(self, ask: Callable[[], Any]) -> None:
        while not self.ended.is_set():
            try:
                self.found.append(ask())
            except Exception as error:
                self.found.append(error)

    def stop(self) -> list[Any]:
        self.ended.set()
        for thread in self.threads:
            thread.join(90)
            assert not thread.is_alive(), "a request hangs"
        return self.found


def test_service_refuses_overload_at_once(service: Service) -> None:
    """Requests beyond the queue's limit are refused at once, and accepted ones are answered."""
    whole = body(*[photo(i) for i in range(40)], criterion="l1:0")

    def ask(_: int) -> tuple[int, str | None, float, int]:
        started = time.monotonic()
        answer = httpx.post(f"{service.url}/v1/encode", json=whole, headers=HEADERS, timeout=120)
        good = sum("ids" in result for result in answer.json().get("results", []))
        return answer.status_code, answer.headers.get("retry-after"), time.monotonic() - started, good

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(16)))
    assert {status for status, *_ in found} == {200, 503}
    for status, later, seconds, good in found:
        assert seconds < 45
        assert (good == 40) if status == 200 else later == "1"
    started = time.monotonic()
    assert ask(0)[0] == 200
    assert time.monotonic() - started < 20


def test_service_drops_the_work_of_clients_that_left(service: Service) -> None:
    """Work for clients that have disconnected is dropped."""
    whole = httpx.Request("POST", service.url, json=body(*[photo(i) for i in range(40)], criterion="l1:0")).read()
    head = f"POST /v1/encode HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(whole)}\r\n\r\n"
    gone = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(6)]
    for connection in gone:
        connection.sendall(head.encode() + whole)
    time.sleep(1.5)  # they are in the queue now: some 6 s of work
    for connection in gone:
        connection.close()
    time.sleep(0.5)
    started = time.monotonic()
    answer = httpx.post(f"{service.url}/v1/encode", json=BODY, headers=HEADERS, timeout=60)
    assert answer.status_code == 200
    alone = time.monotonic()
    httpx.post(f"{service.url}/v1/encode", json=BODY, headers=HEADERS, timeout=60)
    assert alone - started < 2 * (time.monotonic() - alone) + 1.5  # a batch may be under way


def test_service_survives_a_killed_replica(service: Service) -> None:
    """A killed replica costs only the requests that it worked on, which the client can repeat."""
    clients = Clients(lambda: httpx.post(f"{service.url}/v1/encode", json=BODY, headers=HEADERS, timeout=60))
    time.sleep(2)
    (replica,) = named(service.process.pid, "ServeReplica:alit:Encoder")
    os.kill(replica, signal.SIGKILL)
    killed = len(clients.found)
    service.ready()
    time.sleep(2)
    found = clients.stop()
    assert not [answer for answer in found if isinstance(answer, Exception)]
    assert {answer.status_code for answer in found} <= {200, 503}
    lost = [answer for answer in found if answer.status_code == 503]
    assert all(answer.headers["retry-after"] == "1" for answer in lost)
    assert all(answer.headers["content-type"] == "application/problem+json" for answer in lost)
    assert found[-1].status_code == 200
    assert len(found) > killed
    with Client(service.url, KEY, tries=20) as patient:  # which is how the client sees such a time
        (again,) = named(service.process.pid, "ServeReplica:alit:Encoder")
        os.kill(again, signal.SIGKILL)
        assert "ids" in patient.encode([photo(0)])[0]


def test_service_reloads_settings_without_failures(service: Service) -> None:
    """New settings take effect without a failed request, in new replicas."""
    with Client(service.url, KEY, tries=1) as client:
        assert "ids" in client.encode([photo(0)])[0]
    old = named(service.process.pid, "ServeReplica:alit:")
    clients = Clients(lambda: httpx.post(f"{service.url}/v1/encode", json=BODY, headers=HEADERS, timeout=60))
    time.sleep(1)
    change(service, SETTINGS + "retry_after_seconds: 2\n", "using the new settings")
    time.sleep(2)
    found = clients.stop()
    assert [answer for answer in found if isinstance(answer, Exception) or answer.status_code != 200] == []
    assert len(found) > 8
    new = named(service.process.pid, "ServeReplica:alit:")
    assert len(new) == 2
    assert not set(old) & set(new)


def test_service_swaps_models_within_a_replica(service: Service, tmp_path: Path) -> None:
    """A replica that holds one model at a time answers for several, each with its own weights."""
    with torch.random.fork_rng():
        other = save_weights(tmp_path / "other", Alit(SMALLEST).eval(), provenance={})
    models = f"models: {{nano: null, other: {tmp_path / 'other'}}}\nmodels_per_replica: 1\n"
    change(service, SETTINGS + models, "using the new settings")
    loaded = {name: load_weights(folder) for name, folder in (("nano", None), ("other", tmp_path / "other"))}
    told = httpx.get(f"{service.url}/v1/models", headers=HEADERS).json()
    assert [(model["name"], model["fingerprint"]) for model in told["models"]][1] == ("other", other)

    def ask(number: int) -> tuple[int, str, Any]:
        name = ("nano", "other")[number % 2]
        asked = body(photo(number), model=name, criterion="l1:0.05")
        return number, name, httpx.post(f"{service.url}/v1/encode", json=asked, headers=HEADERS, timeout=60)

    with ThreadPoolExecutor(6) as pool:
        for number, name, answer in pool.map(ask, range(12)):
            assert answer.json()["fingerprint"] == loaded[name].fingerprint
            model = loaded[name].model
            pixels = decode_image(photo(number), model.config.image_size).pixels
            alone = model.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None], "l1:0.05")
            assert answer.json()["results"][0]["ids"] == alone.tokens.tolist()


def test_service_keeps_its_settings_if_new_are_invalid(service: Service) -> None:
    """Invalid new settings leave the current ones in force."""
    change(service, SETTINGS + "max_imgs: 3\n", "keeping the old settings: the service's settings: max_imgs")
    answer = httpx.post(f"{service.url}/v1/encode", json=BODY, headers=HEADERS, timeout=60)
    assert answer.status_code == 200


def change(service: Service, settings: str, words: str) -> None:
    """Gives a running service other settings, and waits until it says so."""
    said = service.log.read_text()
    service.configure(settings)
    service.process.send_signal(signal.SIGHUP)
    until = time.monotonic() + 90
    while words not in service.log.read_text()[len(said) :]:
        assert time.monotonic() < until, service.log.read_text()
        time.sleep(0.2)


def test_service_keeps_its_settings_if_new_fail_to_start(service: Service) -> None:
    """New settings with which the service cannot start leave the current ones in force."""
    change(service, SETTINGS + "threads: 3\n", "keeping the old settings: more processes or threads")
    answer = httpx.post(f"{service.url}/v1/encode", json=BODY, headers=HEADERS, timeout=60)
    assert answer.status_code == 200


def test_service_shuts_down_gracefully(tmp_path: Path) -> None:
    """Requests in progress are answered before the service ends."""
    service = Service(tmp_path, "max_images: 64\nqueue: 128\n").ready()
    whole = body(*[photo(i) for i in range(64)], criterion="l1:0")
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(httpx.post, f"{service.url}/v1/encode", json=whole, timeout=60) for _ in range(2)]
        time.sleep(1.5)
        assert service.stop() == 0
        assert [answer.result().status_code for answer in asked] == [200, 200]
