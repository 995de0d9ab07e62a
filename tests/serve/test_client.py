"""The Python client."""

from __future__ import annotations

import subprocess
import sys

import pytest
from service import KEY, Service, photo

from serve.client import Client, ServiceError


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
