"""`alit submit` on a real cluster with a token: the job's log and exit code here, mistakes as sentences, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from clusters import BIN, CALM, Head, free_ports, wait_for
from processes import named

from alit.images import encode_image
from serve.client import Client

CLUSTER = Path(__file__).parents[1] / "cluster"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    labels = ["--labels", "tier=cpu", "--num-cpus", "6"]
    running = Head(Path("/tmp") / f"alit-{os.getpid()}", *labels)  # short: sockets lie below it
    yield running
    running.stop()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(12):
        (folder / f"{number}.png").write_bytes(encode_image(random.integers(0, 256, (40, 40, 3), np.uint8)))
    return folder


def alit(head: Head, *words: str | Path, **environment: str) -> subprocess.Popen[str]:
    variables = os.environ | CALM | {"RAY_API_SERVER_ADDRESS": head.url} | environment
    command = [str(BIN / "alit"), "submit", *map(str, words)]
    pipe: Any = subprocess.PIPE

    def interruptible() -> None:  # in the background of a shell, whose children ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True, preexec_fn=interruptible)


def done(process: subprocess.Popen[str], patience: float = 150) -> tuple[int, str]:
    out, err = process.communicate(timeout=patience)
    return process.returncode, out + err


def entrypoint(job: str) -> list[str]:
    text = (CLUSTER / "kubernetes" / "base" / f"{job}.yaml").read_text()
    return yaml.safe_load(text)["spec"]["entrypoint"].split()[1:]


def test_the_manifests_entrypoints_run_to_the_end(head: Head, photos: Path, tmp_path: Path) -> None:
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    places = {"s3://photos/corpus": photos, "s3://tokens/corpus": tokens, "s3://runs/base": run}
    less = {"--workers": "1", "--threads": "1", "--batch-size": "4", "--worker-memory": "0.2"}
    jobs = []
    for name, more in (("tokenize", []), ("train", ["--steps", "4", "--preset", "nano"])):
        words = [str(places.get(word, word)) for word in entrypoint(name)]
        words = [less.get(before, word) for before, word in zip(["", *words[:-1]], words, strict=True)]
        jobs.append(alit(head, *words, *more))
    for job in jobs:
        code, said = done(job)
        assert code == 0, said
    assert (tokens / "_manifest.json").exists()
    assert (run / "weights" / "model.safetensors").exists()


def test_mistakes_are_sentences_and_the_jobs_own_exit_code(head: Head, photos: Path, tmp_path: Path) -> None:
    moon = ["--worker-labels", "tier=moon", "--patience", "2"]
    cases = {
        "'/absent' does not exist": alit(head, "tokenize", "/absent", tmp_path / "a"),
        "the cluster has no room for 1 x (0.5 CPU, 1 GPU) after 2 s": alit(
            head, "tokenize", photos, tmp_path / "b", "--workers", "1", "--gpus-per-worker", "1", "--patience", "2"
        ),
        "no room for 1 x (1 CPU) on tier=moon": alit(head, "tokenize", photos, tmp_path / "c", "--workers", "1", *moon),
        "nobody answers at http://127.0.0.1:9": alit(head, "--address", "http://127.0.0.1:9", "tokenize", "a", "b"),
        "--address must be the URL": alit(head, "--address", "head:8265", "tokenize", "a", "b"),
        "the cluster asks for its token: set RAY_AUTH_MODE=token": alit(head, "tokenize", "a", "b", RAY_AUTH_TOKEN="x"),
        "--env NO_SUCH_VARIABLE: this variable is not set here": alit(
            head, "--env", "NO_SUCH_VARIABLE", "tokenize", "a", "b"
        ),
        "the cluster refuses": alit(head, "--follow-job", "absent"),
        "--labels takes labels such as tier=gpu, got 'moon'": alit(head, "--labels", "moon", "tokenize", "a", "b"),
    }
    for words, process in cases.items():
        code, said = done(process)
        assert words in said, said
        assert code == 2, said
        assert "Traceback" not in said


def test_a_job_that_is_stopped_leaves_nothing_running(head: Head, photos: Path, tmp_path: Path) -> None:
    job = alit(head, "--name", "to-be-stopped", "train", "base", photos, tmp_path / "run", "--batch-size", "4")
    until = time.monotonic() + 90
    while not named(head.process.pid, "RayTrainWorker"):
        assert job.poll() is None, done(job)
        assert time.monotonic() < until
        time.sleep(0.5)
    code, said = done(alit(head, "--stop-job", "to-be-stopped"))
    assert code == 0, said
    code, said = done(job)
    assert code == 130
    assert "was stopped" in said
    until = time.monotonic() + 30
    while left := [pid for word in ("RayTrainWorker", "jobs.cli", "Mailbox") for pid in named(head.process.pid, word)]:
        assert time.monotonic() < until, left
        time.sleep(0.5)
    again, said = done(alit(head, "--name", "to-be-stopped", "tokenize", "a", "b"))
    assert again == 2
    assert "to-be-stopped" in said


def test_following_can_end_before_the_job(head: Head, photos: Path, tmp_path: Path) -> None:
    job = alit(head, "--name", "goes-on", "tokenize", photos, tmp_path / "tokens", "--workers", "1")
    assert job.stderr is not None
    while "goes on if this command is interrupted" not in job.stderr.readline():
        assert job.poll() is None
    time.sleep(1)
    job.send_signal(signal.SIGINT)
    code, said = done(job)
    assert code == 130
    assert "--follow-job goes-on" in said
    code, said = done(alit(head, "--follow-job", "goes-on"))
    assert code == 0
    assert "12 images tokenized" in said


def test_the_manifests_service_answers(head: Head, photos: Path, tmp_path: Path) -> None:
    manifest = yaml.safe_load((CLUSTER / "kubernetes" / "base" / "serve.yaml").read_text())
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    (port,) = free_ports(1)
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] |= {"min_replicas": 1, "max_replicas": 1, "api_replicas": 1}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | CALM
    deploy = [str(BIN / "serve"), "deploy", "-a", head.url, str(tmp_path / "serve.yaml")]
    done = subprocess.run(deploy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wait_for(f"http://127.0.0.1:{port}/readyz", head.log, 90)
    with Client(f"http://127.0.0.1:{port}") as client:
        (result,) = client.encode([(photos / "0.png").read_bytes()], criterion="fixed:16")
    assert len(result["ids"]) == 16
    shutdown = [str(BIN / "serve"), "shutdown", "-y", "-a", head.url]
    assert subprocess.run(shutdown, env=environment, capture_output=True, check=False).returncode == 0
