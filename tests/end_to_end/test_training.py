"""`alit train` killed in the middle, on S3 and on nodes that come and go: the same weights in the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from training_runs import OPTIONS, assert_same, save_base, tensors, write_smooth_images

from alit.weights import load_weights
from jobs.storage.path import parse_uri
from jobs.training.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Forty smooth images and one broken file."""
    return write_smooth_images(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Weights of an untrained base, to distill."""
    return save_base(tmp_path_factory.mktemp("base") / "weights")


def command(stage: str, photographs: Path, run: str, *options: object) -> list[str]:
    return [sys.executable, "-m", "jobs.cli", "train", stage, str(photographs), run, *OPTIONS, *map(str, options)]


def start(arguments: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    root = str(ROOT)
    with log.open("ab") as file:
        return subprocess.Popen(arguments, cwd=root, stdout=file, stderr=file, env=os.environ | environment)


def wait_for(happened: Callable[[], Any], process: subprocess.Popen[bytes], log: Path, seconds: float = 180) -> Any:
    ends = time.monotonic() + seconds
    while not (found := happened()):
        assert process.poll() is None, f"it ended early:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < ends, f"not within {seconds} s:\n{log.read_text()[-3000:]}"
        time.sleep(0.05)
    return found


def newest(folder: Path) -> int:
    """The newest checkpoint's step, in a folder on this disk."""
    return max((int(file.stem[5:]) for file in (folder / "checkpoints").glob("step-*.json")), default=0)


STEPS = 200


@pytest.fixture(scope="module")
def undisturbed(photographs, base, tmp_path_factory) -> Path:
    """A run without Ray that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    options = ["--init", base, "--steps", STEPS, "--no-ray", "--checkpoint-every", "1000"]
    process = start(command("distill", photographs, str(folder / "run"), *options), folder / "log")
    assert process.wait(300) == 0, (folder / "log").read_text()
    return folder / "run"


def test_training_resumes_bitwise_after_a_kill(undisturbed, photographs, base, tmp_path):
    """A run that is killed and started again ends with bitwise the weights of an undisturbed one."""
    options = ["--init", base, "--steps", STEPS, "--no-ray", "--checkpoint-every", "10"]
    arguments, log = command("distill", photographs, str(tmp_path / "run"), *options), tmp_path / "log"
    process = start(arguments, log)
    wait_for(lambda: newest(tmp_path / "run") >= 10, process, log)
    process.kill()
    process.wait(10)
    assert not (tmp_path / "run" / "weights").exists()
    process = start(arguments, log)
    assert process.wait(300) == 0, log.read_text()
    assert int(re.findall(r"resuming at step (\d+)", log.read_text())[-1]) >= 10
    assert_same(tensors(tmp_path / "run"), tensors(undisturbed))
    assert "broken.jpg" in (tmp_path / "run" / "rejects.jsonl").read_text()
    assert [file.suffix for file in (tmp_path / "run" / "checkpoints").iterdir()].count(".pt") == 2, "the last ones"


def test_training_on_ray_and_s3_survives_kills(undisturbed, photographs, base, bucket, tmp_path):
    """On Ray and S3, a killed worker and a killed driver do not change the final weights."""
    query, folder, _ = bucket
    run, log = folder / "training", tmp_path / "log"
    options = ["--init", base, "--steps", STEPS, "--checkpoint-every", "25", "--keep", "1"]
    arguments = command("distill", photographs, f"s3://photos/training?{query}", *options)
    process = start(arguments, log)

    def worker() -> list[str]:
        return re.findall(r"process (\d+) on", log.read_text())

    wait_for(lambda: newest(run) >= 25, process, log)
    first = worker()
    assert len(first) == 1
    os.kill(int(first[0]), signal.SIGKILL)
    assert len(wait_for(lambda: len(worker()) == 2 and worker(), process, log)) == 2, "Ray started another one"
    reached = newest(run)
    wait_for(lambda: newest(run) > reached, process, log)
    process.kill()
    process.wait(10)
    assert reached < newest(run) < STEPS, "killed in the middle"
    process = start(arguments, log)
    assert process.wait(300) == 0, log.read_text()
    steps = [int(step) for step in re.findall(r"resuming at step (\d+)", log.read_text())]
    assert len(steps) == 2
    assert 25 <= steps[0] < steps[1] < STEPS
    assert_same(tensors(run), tensors(undisturbed))
    assert load_weights(run / "weights").provenance["stage"] == "distill"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(50, STEPS + 1, 50))
    assert list((run / "tensorboard").iterdir())
    assert not (run / ".ray").exists()


@pytest.fixture
def nodes(monkeypatch) -> Iterator[Any]:
    """A Ray cluster of this machine's own: a head that does not work, and two nodes that do."""
    for name, value in {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "500",
        "RAY_health_check_failure_threshold": "4",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "OMP_WAIT_POLICY": "passive",  # workers have more threads here than there are cores
        "PYTHONPATH": str(ROOT),
    }.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_training_continues_when_nodes_leave_and_join(nodes, photographs, base, tmp_path):
    """Training continues with fewer workers when a node is lost and with more when one joins."""
    lost = nodes.add_node(num_cpus=3)
    nodes.add_node(num_cpus=3)
    log = tmp_path / "log"
    options = ["--init", base, "--steps", 100_000, "--checkpoint-every", "20", "--workers", "1:2"]
    arguments = command("distill", photographs, str(tmp_path / "run"), *options)
    arguments[arguments.index("--threads") + 1] = "2"  # so that a node has room for one worker, and for reading images
    process = start(arguments, log, RAY_ADDRESS=nodes.address)

    def groups() -> list[int]:
        return [int(count) for count in re.findall(r"with (\d) worker", log.read_text())]

    def trained_on() -> None:
        reached = newest(tmp_path / "run")
        wait_for(lambda: newest(tmp_path / "run") >= reached + 20, process, log)

    try:
        wait_for(lambda: 2 in groups(), process, log)
        trained_on()
        seen = len(groups())
        nodes.remove_node(lost)
        wait_for(lambda: 1 in groups()[seen:], process, log)
        trained_on()
        seen = len(groups())
        nodes.add_node(num_cpus=3)
        wait_for(lambda: 2 in groups()[seen:], process, log)
        trained_on()
    finally:
        process.kill()
        process.wait(10)
    steps = [int(step) for step in re.findall(r"resuming at step (\d+)", log.read_text())]
    assert len(steps) >= 2
    assert steps == sorted(steps)
    state = Checkpoints(parse_uri(str(tmp_path / "run" / "checkpoints"))).load_latest()
    assert state is not None
    assert state["step"] >= steps[-1] + 20
