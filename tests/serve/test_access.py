"""Authentication, rate limits, and the log of requests."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from service import KEY, Service, assert_problem, body, photo

from serve.access import AccessMiddleware
from serve.settings import Settings


def test_access_requires_a_known_key(service: Service) -> None:
    """Without a known key, requests are refused with 401, and the log holds no key."""
    asked = body(photo(0))
    with httpx.Client(base_url=service.url) as stranger:
        assert_problem(stranger.post("/v1/encode", json=asked), 401, "Authorization: Bearer KEY")
        wrong = stranger.post("/v1/encode", json=asked, headers={"Authorization": "Bearer " + "x" * 30})
        assert_problem(wrong, 401, "unknown API key")
        assert wrong.headers["www-authenticate"].startswith("Bearer")
        assert_problem(stranger.get("/v1/models"), 401, "key")
        assert stranger.get("/healthz").is_success
        assert stranger.get("/").headers["content-security-policy"].startswith("default-src 'self'")
    assert KEY not in service.log.read_text()


def test_access_ignores_timeout_headers_of_clients(http: httpx.Client) -> None:
    """Headers about timeouts that Ray Serve would obey have no effect."""
    headers = {"x-request-timeout-seconds": "0", "x-request-disconnect-disabled": "?1"}
    assert http.post("/v1/encode", json=body(photo(0)), headers=headers).is_success


def test_access_logs_every_request(service: Service, http: httpx.Client) -> None:
    """Every request is one line of the log, with the key's name and without the key."""
    lines: list[dict[str, Any]] = []
    until = time.monotonic() + 30
    while not lines and time.monotonic() < until:  # Serve buffers its log
        http.post("/v1/encode?criterion=nonsense:1", content=photo(0), headers={"content-type": "image/jpeg"})
        lines = [line for line in service.requests() if line["status"] == 422 and line["path"] == "/v1/encode"]
    assert lines, service.log.read_text()
    assert (lines[-1]["method"], lines[-1]["key"]) == ("POST", "tests")
    assert lines[-1]["seconds"] >= 0
    assert lines[-1]["request_id"]
    assert not any(KEY in str(line) for line in service.requests())


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
            assert_problem(refused, 429, "30 requests a minute")
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
