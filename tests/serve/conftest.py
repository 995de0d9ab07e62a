"""One service for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from service import KEY, SETTINGS, Service

import alit
from alit.weights import Weights


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "serve").mkdir()  # a folder of the user's own with this name
    (folder / "serve" / "__init__.py").write_text("raise SystemExit('imported from the working folder')\n")
    running = Service(folder, SETTINGS, ALIT_KEYS=f"tests:{KEY}").ready()
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture(scope="package")
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


@pytest.fixture(scope="package")
def weights() -> Weights:
    return alit.load_weights()
