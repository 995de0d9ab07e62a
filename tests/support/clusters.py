"""A real Ray cluster for the tests, whose nodes are started with `ray start` and ended by the tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from processes import family

BIN = Path(sys.executable).parent
TOKEN = "a-token-for-tests-" + "0" * 46
CALM = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",  # as many processes as the node has CPUs
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
}
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
FAKE_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_ID = "f" * 51 + "00000"
"""Of the head, to Ray's fake provider of nodes."""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def build(folder: Path) -> list[dict[str, Any]]:
    """All objects of a kustomization, as `kubectl apply -k` would send them."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl, which builds the overlays")
    made = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))


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

    def stop(self) -> None:
        """Ends the node's processes at once, as a power cut would."""
        if self.process.returncode is not None:  # its number may be another's by now
            return
        for pid in family(self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)


def wait_for(url: str, log: Path, patience: float = 180, **options: Any) -> None:
    """Until something answers there without an error."""
    until = time.monotonic() + patience
    while True:
        try:
            if httpx.get(url, timeout=10, **options).is_success:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)


class Head(Node):
    """A cluster of one node, with its dashboard.

    Args:
        folder: for Ray's own files; its path must be short.
        arguments: of `ray start`.
        autoscaling: node types that come when they are needed, as `ray up` takes them; they run on this machine.
        environment: besides what calms Ray.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        autoscaling: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        port, dashboard, agent = free_ports(3)
        self.folder = folder
        self.url, self.address = f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}"
        fixed = ["--head", "--port", str(port), "--dashboard-port", str(dashboard), "--temp-dir", str(folder / "ray")]
        fixed += ["--dashboard-agent-listen-port", str(agent), "--object-store-memory", str(200 << 20)]
        variables = dict(environment or {})
        if autoscaling is not None:
            own = f"{ray.util.get_node_ip_address()}:{port}"
            provider = {"type": "external", "module": FAKE_PROVIDER, "gcs_address": own, "head_node_id": HEAD_ID}
            provider |= {"launch_multiple": True}  # external, as the wheel lacks a file of the provider's own type
            folder.mkdir(parents=True, exist_ok=True)
            config = folder / "autoscaling.json"  # YAML, too
            commands = ["setup", "head_setup", "worker_setup", "initialization", "head_start_ray", "worker_start_ray"]
            rest = {f"{name}_commands": [] for name in commands} | {
                "file_mounts": {},
                "cluster_synced_files": [],
                "auth": {},
            }
            config.write_text(json.dumps(rest | autoscaling | {"provider": provider}))
            fixed += ["--autoscaling-config", str(config)]
            variables |= {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
            variables |= {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
        super().__init__(folder, [*fixed, *arguments], environment=variables)
        wait_for(f"{self.url}/api/version", self.log, headers=AUTHORIZED)

    def await_nodes(self, alive: int, dead: int = 0, patience: float = 180) -> None:
        """Waits until there are so many, as the dashboard has it, which looks every few seconds."""
        until = time.monotonic() + patience
        while True:
            found = httpx.get(f"{self.url}/nodes?view=summary", headers=AUTHORIZED, timeout=10).json()
            states = [each["raylet"]["state"] for each in found["data"]["summary"]]
            if (states.count("ALIVE"), states.count("DEAD")) == (alive, dead):
                return
            assert time.monotonic() < until, states
            time.sleep(0.5)
