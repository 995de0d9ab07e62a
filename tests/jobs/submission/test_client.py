"""`alit submit` on a real cluster with a token: logs, exit codes, errors, and no processes left behind."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
import yaml
from clusters import AUTHORIZED, BIN, CALM, Head, Node, build, free_ports, wait_for
from dashboard import ask, filled, panels
from paths import CLUSTER
from processes import family, named

from alit.errors import AlitError
from jobs.submission.client import submit
from jobs.submission.options import SubmitOptions
from serve.client import Client

pc: Any = pyarrow.compute


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    labels = ["--labels", "tier=cpu", "--num-cpus", "6"]
    often = {"RAY_metrics_report_interval_ms": "500"}  # of metrics
    running = Head(Path("/tmp") / f"alit-{os.getpid()}", *labels, environment=often)  # short: sockets lie below it
    yield running
    running.stop()


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


def base(name: str) -> dict[str, Any]:
    """The spec of a manifest for CPUs."""
    return yaml.safe_load((CLUSTER / "kubernetes" / "base" / f"{name}.yaml").read_text())["spec"]


def overlay(name: str, kind: str) -> dict[str, dict[str, Any]]:
    """The objects of a kind in an overlay, by name."""
    made = build(CLUSTER / "kubernetes" / "overlays" / name)
    return {each["metadata"]["name"]: each for each in made if each["kind"] == kind}


def run_entrypoint(
    head: Head, entrypoint: str, folder: Path, *more: str, name: str | None = None, **less: str
) -> subprocess.Popen[str]:
    """Submits a manifest's entrypoint, with other places and with other values of some options."""
    own = ["--name", name] if name else []
    places = {"s3://photos/corpus": folder / "images", "s3://tokens/corpus": folder / "tokens"}
    places |= {"s3://runs/base": folder / "run"}
    words = [str(places.get(word, word)) for word in entrypoint.split()[1:]]
    less = {f"--{name.replace('_', '-')}": value for name, value in less.items()}
    words = [less.get(before, word) for before, word in zip(["", *words[:-1]], words, strict=True)]
    return alit(head, *own, *words, *more)


@contextmanager
def deployed(head: Head, config: str, folder: Path, **less: int) -> Iterator[str]:
    """The address of what a manifest's serveConfigV2 deploys, with other values of some settings."""
    found = yaml.safe_load(config)
    (port,) = free_ports(1)
    found["http_options"] |= {"host": "127.0.0.1", "port": port}
    found["applications"][0]["args"] |= less
    (folder / "serve.yaml").write_text(yaml.safe_dump(found))
    deploy = [str(BIN / "serve"), "deploy", "-a", head.url, str(folder / "serve.yaml")]
    done = subprocess.run(deploy, env=os.environ | CALM, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    try:
        wait_for(f"http://127.0.0.1:{port}/readyz", head.log, 90)
        yield f"http://127.0.0.1:{port}"
    finally:
        shutdown = [str(BIN / "serve"), "shutdown", "-y", "-a", head.url]
        subprocess.run(shutdown, env=os.environ | CALM, capture_output=True, check=False)
    until = time.monotonic() + 60
    while head.process.returncode is None and named(head.process.pid, "ServeReplica"):
        assert time.monotonic() < until, "the service is still there"
        time.sleep(0.3)


def await_process(head: Head, word: str, job: subprocess.Popen[str], patience: float = 90) -> None:
    until = time.monotonic() + patience
    while not named(head.process.pid, word):
        assert job.poll() is None, done(job)
        assert time.monotonic() < until
        time.sleep(0.3)


@pytest.fixture(scope="module")
def prometheus(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str | None]:
    """The address of a real one with the configuration of cluster/monitoring, but that it looks every second."""
    if shutil.which("prometheus") is None:
        yield None
        return
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((CLUSTER / "monitoring" / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (discovery,) = config["scrape_configs"][0]["file_sd_configs"]
    discovery["files"] = [file.replace("/tmp/ray", str(head.folder / "ray")) for file in discovery["files"]]
    discovery["refresh_interval"] = "1s"
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(CLUSTER / "monitoring" / "alerts.yaml", folder)
    (port,) = free_ports(1)
    words = ["prometheus", f"--config.file={folder / 'prometheus.yaml'}", f"--web.listen-address=127.0.0.1:{port}"]
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([*words, f"--storage.tsdb.path={folder / 'data'}"], stdout=file, stderr=file)
    wait_for(f"http://127.0.0.1:{port}/-/ready", log)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def ran(head: Head, prometheus: str | None, twelve_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what the entrypoints of the jobs' manifests have made of thirteen files, one of them broken."""
    folder = tmp_path_factory.mktemp("ran")
    shutil.copytree(twelve_images, folder / "images")
    (folder / "images" / "broken.png").write_bytes(b"no picture")
    less = {"workers": "1", "threads": "1", "batch_size": "4", "worker_memory": "0.2"}
    train = ["--steps", "4", "--log-every", "1", "--preset", "nano"]
    tokenizing = run_entrypoint(head, base("tokenize")["entrypoint"], folder, name="tokenized", **less)
    training = run_entrypoint(head, base("train")["entrypoint"], folder, *train, **less)
    for job, last in ((tokenizing, "12 images tokenized"), (training, "weights: ")):
        code, said = done(job)
        assert code == 0, said
        assert last in said
    code, said = done(alit(head, "--follow-job", "tokenized"))  # again, after its end
    assert (code, "12 images tokenized" in said) == (0, True)
    return folder


@pytest.fixture(scope="module")
def service(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of what the manifest's service configuration deploys."""
    config = base("serve")["serveConfigV2"]
    less = {"min_replicas": 1, "max_replicas": 1, "api_replicas": 1}
    with deployed(head, config, tmp_path_factory.mktemp("service"), **less) as url:
        yield url


def test_submit_runs_the_manifests_entrypoints(ran: Path) -> None:
    """The entrypoints of the jobs' manifests run to their end on a cluster."""
    assert (ran / "tokens" / "_manifest.json").exists()
    assert (ran / "run" / "weights" / "model.safetensors").exists()


def test_service_of_the_manifest_answers(service: str, twelve_images: Path) -> None:
    """The service that the manifest deploys encodes an image."""
    with Client(service) as client:
        (result,) = client.encode([(twelve_images / "0.png").read_bytes()], criterion="fixed:16")
    assert len(result["ids"]) == 16


@pytest.mark.parametrize("row", ["Service", "Tokenization", "Training", "Cluster"])
def test_dashboard_panels_show_data(
    prometheus: str | None, ran: Path, service: str, twelve_images: Path, row: str
) -> None:
    """Every panel shows data of what ran on this cluster, which has no GPU, no autoscaler and no late request."""
    if prometheus is None:
        pytest.skip("needs prometheus")
    missing = {"GPU utilization", "Model FLOPs utilization", "Deadline exceeded", "Rejected files per second"}
    missing |= {"pending", "failed"}
    image = (twelve_images / "0.png").read_bytes()
    for panel in panels(row):
        for target in panel["targets"]:
            until = time.monotonic() + 20
            while not (found := seen(prometheus, filled(target["expr"], "1m"))) or (
                row == "Service" and not all(map(math.isfinite, found))
            ):
                if time.monotonic() > until or {panel["title"], target["legendFormat"]} & missing:
                    break
                if row == "Service":  # a rate takes counts that grow
                    with Client(service) as client:
                        client.encode([image])
                time.sleep(0.5)
            assert found or {panel["title"], target["legendFormat"]} & missing, (panel["title"], target["expr"])
            if row == "Service":
                assert all(map(math.isfinite, found)), panel["title"]


def seen(prometheus: str, query: str) -> list[float]:
    """The last numbers, within the last ten minutes, of what a query gives; NaN where a series has none."""
    now = time.time()
    found = ask(prometheus, "query_range", query=query, start=now - 600, end=now, step=1)
    values = [[float(value) for _, value in series["values"]] for series in found]
    return [next(filter(math.isfinite, reversed(each)), math.nan) for each in values]


def test_metrics_match_the_output_of_the_jobs(prometheus: str | None, ran: Path) -> None:
    """The metrics in Prometheus equal the images, tokens, rejects and steps of the jobs."""
    if prometheus is None:
        pytest.skip("needs prometheus")
    tokens = pq.read_table(ran / "tokens" / "data", columns=["num_tokens"])["num_tokens"]
    where = f'{{dataset="{ran / "tokens"}"}}'
    expected = {
        f"ray_alit_job_images_total{where}": 12,
        f"ray_alit_job_tokens_total{where}": pc.sum(tokens).as_py(),
        f'ray_alit_job_rejects_total{{reason="not_an_image",dataset="{ran / "tokens"}"}}': 1,
    }
    for query, value in expected.items():
        assert seen(prometheus, query) == [value], query
    (step,) = seen(prometheus, f'ray_alit_train_step{{run="{ran / "run"}"}}')
    assert 1 <= step <= 4  # a gauge of a process that may be gone before it tells the last one
    (age,) = seen(prometheus, f'time() - ray_alit_train_checkpoint_timestamp_seconds{{run="{ran / "run"}"}}')
    assert 0 <= age < 600


NO_ROOM = """
from jobs.runtime.session import ray_session
from alit.errors import AlitError
from jobs.runtime.resources import Workers, wait_for_workers
with ray_session():
    for where in ({"labels": {"tier": "moon"}}, {"decoders": 1, "decode_labels": {"tier": "sun"}}, {"memory": 1 << 50}):
        try:
            wait_for_workers(Workers(count=1, **where), 0.1)
        except AlitError as error:
            print(error)
"""


@pytest.mark.slow
def test_submit_reports_the_jobs_errors_and_exit_code(head: Head, twelve_images: Path, tmp_path: Path) -> None:
    """Errors of a job on the cluster arrive as one sentence with the job's exit code."""
    variables = os.environ | CALM | {"RAY_ADDRESS": head.address}
    rooms = subprocess.Popen([BIN / "python", "-c", NO_ROOM], env=variables, stdout=subprocess.PIPE, text=True)
    one = [twelve_images, tmp_path / "out", "--workers", "1", "--patience", "0.1"]
    cases = {
        "'/absent' does not exist": alit(head, "tokenize", "/absent", tmp_path / "a"),
        "no room for 1 x (0.5 CPU, 1 GPU) and 1 x (1 CPU)": alit(head, "tokenize", *one, "--gpus-per-worker", "1"),
        "the cluster asks for its token: set RAY_AUTH_MODE=token": alit(head, "tokenize", "a", "b", RAY_AUTH_TOKEN="x"),
        "the cluster refuses": alit(head, "--follow-job", "absent"),
    }
    for words, process in cases.items():
        code, said = done(process)
        assert words in said, said
        assert code == 2, said
        assert "Traceback" not in said
    out, _ = rooms.communicate(timeout=60)
    moon, sun, memory = out.splitlines()
    assert "no room for 1 x (1 CPU) on tier=moon after 0.1 s" in moon
    assert "no room for 1 x (1 CPU) and 1 x (1 CPU) on tier=sun after 0.1 s" in sun
    assert "no room for 1 x (1 CPU, 1.1259e+15 memory) after 0.1 s" in memory


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"address": "http://127.0.0.1:9"}, "cannot connect to http://127.0.0.1:9"),
        ({"address": "head:8265"}, "--address must be the URL"),
        ({"env": ("NO_SUCH_VARIABLE",)}, "--env NO_SUCH_VARIABLE: this variable is not set here"),
        ({"labels": ("moon",)}, "--labels takes labels such as tier=gpu, got 'moon'"),
    ],
)
def test_submit_refuses_wrong_options(options: dict[str, Any], words: str) -> None:
    """Wrong options are refused with one sentence before anything is sent."""
    with pytest.raises(AlitError, match=re.escape(words)):
        submit(["tokenize", "a", "b"], SubmitOptions(**options))


@pytest.mark.slow
def test_follow_reports_a_broken_environment(head: Head) -> None:
    """A job whose environment cannot be built ends with one sentence and exit code 1."""
    job = {"entrypoint": "true", "submission_id": "bare"}
    job |= {"runtime_env": {"working_dir": "https://127.0.0.1:9/absent.zip"}}
    assert httpx.post(f"{head.url}/api/jobs/", json=job, headers=AUTHORIZED).is_success
    code, said = done(alit(head, "--follow-job", "bare"))
    assert code == 1
    assert "alit: job bare failed:" in said
    assert "absent.zip" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_submit_reports_why_a_job_is_pending(head: Head) -> None:
    """A job that waits for a node reports why, and can be stopped."""
    job = alit(head, "--name", "nowhere", "--labels", "tier=moon", "tokenize", "a", "b")
    assert job.stderr is not None
    while "alit: job nowhere has not started: it waits for a node" not in (line := job.stderr.readline()):
        assert line
    job.send_signal(signal.SIGINT)
    assert done(job)[0] == 130
    code, said = done(alit(head, "--stop-job", "nowhere"))
    assert code == 0, said
    assert "alit: nowhere has not started: it ends when it would start" in said


@pytest.mark.slow
def test_stopped_and_killed_jobs_leave_no_processes(head: Head, twelve_images: Path, tmp_path: Path) -> None:
    """Jobs that are interrupted, stopped or killed leave no processes on the cluster."""
    links = tmp_path / "links.txt"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # its clients wait
        links.write_text("".join(f"http://127.0.0.1:{silent.getsockname()[1]}/{i}.png\n" for i in range(64)))
        killed = alit(head, "--name", "killed", "tokenize", links, tmp_path / "tokens", "--workers", "1")
        train = ["train", "base", twelve_images, tmp_path / "run", "--batch-size", "4", "--threads", "1"]
        stopped = alit(head, "--name", "stopped", *train)
        await_process(head, "MapWorker", killed)
        titles = family(head.process.pid)
        (driver,) = [pid for pid, title in titles.items() if title.startswith("python") and str(links) in title]
        os.kill(driver, signal.SIGKILL)
        code, said = done(killed)
    assert code == 128 + signal.SIGKILL, said
    assert "alit: job killed was ended by signal 9" in said
    await_process(head, "RayTrainWorker", stopped)
    stopped.send_signal(signal.SIGINT)  # ends the following, not the job
    code, said = done(stopped)
    assert code == 130
    assert "alit submit --follow-job stopped follows its log again" in said
    following = alit(head, "--follow-job", "stopped")
    code, said = done(alit(head, "--stop-job", "stopped"))
    assert code == 0, said
    code, said = done(following)
    assert code == 130
    assert "alit: job stopped was stopped" in said
    words = "RayTrainWorker", "MapWorker", "jobs.cli", "EventQueue"
    until = time.monotonic() + 30
    while left := [pid for word in words for pid in named(head.process.pid, word)]:
        assert time.monotonic() < until, left
        time.sleep(0.3)
    again, said = done(alit(head, "--name", "stopped", "tokenize", "a", "b"))
    assert again == 2
    assert "stopped" in said


@pytest.mark.slow
def test_submit_runs_the_manifests_for_gpus(head: Head, twelve_images: Path, tmp_path: Path) -> None:
    """The manifests for GPUs run on a node that claims GPUs: Ray places the work there, on its CPU.

    Training asks PyTorch for the GPU, so `--gpus on` becomes `off` here.
    """
    words = ["--address", head.address, "--num-gpus", "2", "--num-cpus", "8", "--labels", "tier=gpu"]
    node = Node(head.folder / "gpu", [*words, "--object-store-memory", str(100 << 20)])
    try:
        tried: set[str] = set()
        for name in ("single-gpu", "multi-gpu", "spot"):
            jobs, folder, running = overlay(name, "RayJob"), tmp_path / name, []
            shutil.copytree(twelve_images, folder / "images")
            for kind, more in (("tokenize", []), ("train", ["--steps", "2", "--preset", "nano", "--batch-size", "4"])):
                entrypoint = re.sub(r"--workers \d+ ", "--workers 1 ", jobs[f"alit-{kind}"]["spec"]["entrypoint"])
                if entrypoint in tried:  # but for the number of workers it is one that was run
                    continue
                tried.add(entrypoint)
                less = {"worker_memory": "0.2", "decode_workers": "1", "threads": "1", "gpus": "off"}
                less |= {"workers": "1:2"} if ":" in entrypoint.partition("--workers")[2][:5] else {}
                running.append(run_entrypoint(head, entrypoint, folder, *more, **less))
            for job in running:
                code, said = done(job)
                assert code == 0, said
            config = overlay(name, "RayService")["alit-serve"]["spec"]["serveConfigV2"]
            if config not in tried:
                tried.add(config)
                fewer = {"min_replicas": 1, "max_replicas": 1, "api_replicas": 1, "threads": 1}
                with deployed(head, config, folder, **fewer) as url, Client(url) as client:
                    (result,) = client.encode([(twelve_images / "0.png").read_bytes()], criterion="fixed:16")
                    assert len(result["ids"]) == 16
    finally:
        node.stop()


@pytest.mark.slow
def test_submit_reports_a_lost_head(head: Head, twelve_images: Path, tmp_path: Path) -> None:
    """The loss of the cluster's head is reported with one sentence and exit code 2."""
    job = alit(head, "--name", "orphan", "tokenize", twelve_images, tmp_path / "out", "--worker-labels", "tier=moon")
    assert job.stderr is not None
    while "keeps running if this command is interrupted" not in job.stderr.readline():
        assert job.poll() is None
    time.sleep(1)  # for the log to be asked for
    head.stop()
    code, said = done(job)
    assert code == 2
    assert "the cluster does not answer: " in said
    assert "alit submit --follow-job NAME follows its log once the cluster answers again" in said
    assert "Traceback" not in said
