"""Ray's autoscaler with the node types of cluster/ray-up-aws.yaml, on processes in place of machines."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from clusters import BIN, CALM, Head
from paths import CLUSTER


@pytest.mark.slow
def test_autoscaler_adds_and_removes_nodes(twelve_images: Path, tmp_path: Path) -> None:
    """Pending work makes the autoscaler add a node, and the node leaves once it is idle."""
    config = yaml.safe_load((CLUSTER / "ray-up-aws.yaml").read_text())
    names = "cluster_name", "max_workers"
    types = {name: dict(kind) for name, kind in config["available_node_types"].items()}
    types["ray.head.default"] = types.pop(config["head_node_type"]) | {"max_workers": 0}  # the fake provider's name
    types["cpu"]["resources"] = {"CPU": 2, "object_store_memory": 100 << 20}
    for kind in types.values():
        kind["node_config"] = {}
    config = {name: config[name] for name in names} | {
        "available_node_types": types, "head_node_type": "ray.head.default", "idle_timeout_minutes": 0.1,
    }  # fmt: skip
    head = Head(Path("/tmp") / f"alit-as-{os.getpid()}", "--num-cpus", "0", autoscaling=config)
    try:
        head.await_nodes(1)
        command = [str(BIN / "alit"), "submit", "tokenize", str(twelve_images), str(tmp_path / "tokens")]
        command += ["--workers", "1", "--worker-labels", "tier=cpu", "--patience", "60", "--criterion", "fixed:16"]
        variables = os.environ | CALM | {"RAY_API_SERVER_ADDRESS": head.url}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / "tokens" / "_manifest.json").exists()
        head.await_nodes(1, dead=1)  # the one that came has left
    finally:
        head.stop()
