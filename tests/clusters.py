"""A real Ray cluster for the tests: nodes started as an operator would, ended by the processes that started them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from processes import family

BIN = Path(sys.executable).parent
TOKEN = "a-token-for-tests-" + "0" * 46
CALM = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Node:
    """`ray start --block`, perhaps behind another command such as `ip netns exec`.

    Args:
        folder: for Ray's own files; its path must be short, as sockets lie there.
        arguments: of `ray start`.
        before: the command in front of it.
        environment: besides what calms Ray.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        before: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "start.log"
        command = [*before, str(BIN / "ray"), "start", "--block", *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=log,
                stderr=log,
                env=os.environ | CALM | (environment or {}),
                start_new_session=True,
            )

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ends the node's processes."""
        below = family(self.process.pid)
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            pass
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)


def wait_for(url: str, log: Path, patience: float = 60, **options: Any) -> None:
    """Until something answers there without an error."""
    until = time.monotonic() + patience
    while True:
        try:
            if httpx.get(url, timeout=2, **options).is_success:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)


class Head(Node):
    """A cluster of one node, with its dashboard."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        port, dashboard, agent = free_ports(3)
        self.url, self.address = f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}"
        fixed = ["--head", "--port", str(port), "--dashboard-port", str(dashboard), "--temp-dir", str(folder / "ray")]
        fixed += ["--dashboard-agent-listen-port", str(agent), "--object-store-memory", str(200 << 20)]
        super().__init__(folder, [*fixed, *arguments])
        wait_for(f"{self.url}/api/version", self.log, headers={"Authorization": f"Bearer {TOKEN}"})
