"""`alit serve` in a process of its own, and requests to it."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from clusters import free_ports
from PIL import Image

from alit.images.decode import decode_image
from alit.images.encode import encode_image
from alit.weights import Weights

KEY = "a-key-for-the-tests-0123456789"


class Service:
    """`alit serve` in a process of its own."""

    def __init__(self, folder: Path, settings: str = "", **environment: str) -> None:
        (self.port,) = free_ports(1)
        self.log, self.config = folder / "serve.log", folder / "serve.yaml"
        self.configure(settings)
        command = [str(Path(sys.executable).with_name("alit")), "serve", "--config", str(self.config)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=os.environ | environment)
        self.url = f"http://127.0.0.1:{self.port}"

    def configure(self, settings: str) -> None:
        self.config.write_text(f"port: {self.port}\nlogs_dir: logs\n{settings}")

    def ready(self, patience: float = 120) -> Service:
        until = time.monotonic() + patience
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/readyz", timeout=2).is_success:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def requests(self) -> list[dict[str, Any]]:
        """Returns the log's records of requests."""
        files = (self.config.parent / "logs").rglob("replica*Ingress*.log")
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [line for line in lines if line.get("message") == "request"]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


SETTINGS = """
max_images: 40
max_body_bytes: 4000000
max_image_bytes: 1000000
max_pixels: 1000000
requests_per_minute: 6000
"""


def photo(seed: int, size: int = 80) -> bytes:
    """Returns a JPEG of a smooth image with some detail."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (2 + seed % 9, 3, 3), dtype=np.uint8))
    return encode_image(np.array(coarse.resize((size, size + seed), Image.Resampling.BICUBIC)), "jpeg")


def body(*files: bytes, **options: Any) -> dict[str, Any]:
    return {"images": [{"data": base64.b64encode(file).decode()} for file in files]} | options


def encode_alone(weights: Weights, file: bytes, criterion: str) -> Any:
    """Returns what the model itself gives for one image file."""
    pixels = decode_image(file, weights.model.config.image_size).pixels
    return weights.model.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None], criterion)


def assert_problem(response: httpx.Response, status: int, words: str) -> None:
    """Asserts that a response is a problem document with these words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    told = response.json()
    assert told.keys() == {"type", "title", "status", "detail"}
    assert told["status"] == status
    assert words in told["detail"]
