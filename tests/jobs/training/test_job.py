"""`alit train` as a person runs it: killed in the middle, on S3, on nodes that come and go, and with mistakes."""

from __future__ import annotations

import dataclasses
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

import numpy as np
import pytest
import safetensors.torch
import torch
from paths import ROOT
from small_models import TINY

from alit.images.encode import encode_image
from alit.tokenizer import Alit
from alit.weights import load_weights, save_weights
from jobs.cli import main
from jobs.storage.path import parse_uri
from jobs.training.checkpoints import Checkpoints

HALTING = dataclasses.replace(TINY, halting="sampled", halting_threshold=0.03)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Forty smooth pictures, and one file that is none."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for i in range(40):
        coarse = torch.from_numpy(random.random((1, 3, 5, 5), np.float32))
        pixels = torch.nn.functional.interpolate(coarse, size=24, mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
        (folder / f"{i:02}.png").write_bytes(encode_image((255 * pixels).numpy().astype(np.uint8)))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base's weights, to distil; its training is another test's subject."""
    folder = tmp_path_factory.mktemp("base") / "weights"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_weights(folder, Alit(HALTING), provenance={"stage": "base"})
    return folder


OPTIONS = ["--batch-size", "8", "--warmup", "5", "--quantize-from", "10", "--quantize-over", "20", "--pixel-from", "0"]
OPTIONS += ["--grad-iterations", "2", "--log-every", "50", "--threads", "1", "--no-bf16"]


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


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "weights" / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


STEPS = 400


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
    options = ["--init", base, "--steps", STEPS, "--no-ray", "--checkpoint-every", "20"]
    arguments, log = command("distill", photographs, str(tmp_path / "run"), *options), tmp_path / "log"
    process = start(arguments, log)
    wait_for(lambda: newest(tmp_path / "run") >= 20, process, log)
    process.kill()
    process.wait(10)
    assert not (tmp_path / "run" / "weights").exists()
    process = start(arguments, log)
    assert process.wait(300) == 0, log.read_text()
    assert int(re.findall(r"going on at step (\d+)", log.read_text())[-1]) >= 20
    assert_same(tensors(tmp_path / "run"), tensors(undisturbed))
    assert "broken.jpg" in (tmp_path / "run" / "rejects.jsonl").read_text()
    assert [file.suffix for file in (tmp_path / "run" / "checkpoints").iterdir()].count(".pt") == 2, "the last ones"


def test_training_on_ray_and_s3_survives_kills(undisturbed, photographs, base, bucket, tmp_path):
    """On Ray and S3, a killed worker and a killed driver do not change the final weights."""
    query, folder, _ = bucket
    run, log = folder / "training", tmp_path / "log"
    options = ["--init", base, "--steps", STEPS, "--checkpoint-every", "50", "--keep", "1"]
    arguments = command("distill", photographs, f"s3://photos/training?{query}", *options)
    process = start(arguments, log)

    def worker() -> list[str]:
        return re.findall(r"process (\d+) on", log.read_text())

    wait_for(lambda: newest(run) >= 50, process, log)
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
    steps = [int(step) for step in re.findall(r"going on at step (\d+)", log.read_text())]
    assert len(steps) == 2
    assert 50 <= steps[0] < steps[1] < STEPS
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
    steps = [int(step) for step in re.findall(r"going on at step (\d+)", log.read_text())]
    assert len(steps) >= 2
    assert steps == sorted(steps)
    state = Checkpoints(parse_uri(str(tmp_path / "run" / "checkpoints"))).load_latest()
    assert state is not None
    assert state["step"] >= steps[-1] + 20


# ---------------------------------------------------------------- mistakes


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        main(["train", *map(str, arguments)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_train_reports_mistakes_and_writes_nothing(photographs, base, tmp_path, capsys):
    """Mistakes in options and inputs are reported with one sentence, and nothing is written."""
    run = tmp_path / "run"
    quick = ("--no-ray", "--init", base)
    for arguments, sentence in [
        ((tmp_path / "absent", run, *quick), "absent' does not exist"),
        ((tmp_path, run, *quick), "no images in"),
        ((photographs, run, *quick, "--batch-size", 64), "batch_size 64 is larger than the data: 41 photographs"),
        ((photographs, run, "--init", base, "--workers", 0), "--workers must be a number from 1, or a range"),
        ((photographs, run, "--init", base, "--workers", "2:1"), "--workers must be a number from 1, or a range"),
        ((photographs, run, "--init", base, "--workers", 3), "--batch-size 16 cannot be shared equally by 3 workers"),
        ((photographs, run, *quick, "--workers", 2), "--no-ray trains with one worker"),
        ((photographs, run, "--no-ray"), "distill stands on a trained base: name the weights folder with --init"),
        ((photographs, run, *quick, "--criterion", "beauty:1"), "beauty"),
        ((photographs, run, *quick, "--steps", 0), "steps must be at least 1, got 0"),
        ((photographs, run, *quick, "--preset", "giant"), "the preset must be one of nano, tiny"),
        ((photographs, run, *quick, "--config", tmp_path / "absent.toml"), "cannot be read as TOML"),
        ((photographs, "s3://", *quick), "names no bucket or folder"),
        ((photographs, run, *quick, "--sharding", "fsdp"), "needs --workers 2 or more"),
    ]:
        assert sentence in refused(capsys, "distill", *arguments), arguments
    (tmp_path / "vgg.pth").write_bytes(b"no weights at all")
    vgg = ("--vgg", tmp_path / "vgg.pth", "--lpips", tmp_path / "vgg.pth")
    assert "vgg.pth" in refused(capsys, "base", photographs, run, "--no-ray", *vgg)
    assert "needs both files" in refused(capsys, "base", photographs, run, "--no-ray", *vgg[:2])
    assert "holds a base: distill it first" in refused(capsys, "finetune", photographs, run, *quick)
    (tmp_path / "run.toml").write_text("steps = 3\nlearning_speed = 1.0\n")
    wrong = refused(capsys, "distill", photographs, run, *quick, "--config", tmp_path / "run.toml")
    assert "a recipe for distill has no field 'learning_speed'" in wrong
    assert not run.exists()


def test_train_refuses_an_unwritable_run_folder(photographs, base, tmp_path, capsys):
    """A run folder that cannot be written is refused with one sentence."""
    (tmp_path / "file").write_text("in the way")
    error = refused(capsys, "distill", photographs, tmp_path / "file" / "run", "--no-ray", "--init", base)
    assert "cannot be" in error
    assert (tmp_path / "file").read_text() == "in the way"


def test_train_reports_missing_permission(photographs, base, bucket, capsys, monkeypatch):
    """Storage without permission is reported with one sentence, and credentials in a URI are refused."""
    query, folder, _ = bucket
    with_key = f"s3://somebody:else@photos/forbidden?{query}"
    assert "must not hold credentials" in refused(capsys, "distill", photographs, with_key, "--no-ray", "--init", base)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    run = f"s3://photos/forbidden?{query}&timeout=29"  # options of its own, so a client of its own
    assert "cannot be" in (error := refused(capsys, "distill", photographs, run, "--no-ray", "--init", base))
    assert "denied" in error or "signature" in error
    assert not (folder / "forbidden").exists()


def test_train_command_line_overrides_the_config_file(photographs, base, tmp_path, capsys):
    """A configuration file gives defaults, and the command line overrides them."""
    (tmp_path / "run.toml").write_text(f'steps = 4\nbatch_size = 8\nwarmup = 2\nray = false\ninit = "{base}"\n')
    run = tmp_path / "run"
    main(["train", "distill", str(photographs), str(run), "--config", str(tmp_path / "run.toml"), "--steps", "3"])
    written = json.loads((run / "run.json").read_text())
    assert (written["recipe"]["steps"], written["recipe"]["batch_size"], written["init"]) == (3, 8, str(base))
    assert load_weights(run / "weights").provenance["recipe"] == written["recipe"]
    assert "41 photographs; 3 steps of 8" in capsys.readouterr().err


def test_train_dry_run_prints_the_plan(photographs, base, tmp_path, capsys):
    """A dry run prints the plan and writes nothing."""
    run = tmp_path / "run"
    main(["train", "distill", str(photographs), str(run), "--init", str(base), "--dry-run", "--workers", "2"])
    said = capsys.readouterr().err
    assert re.search(r"distill: 16 px, 4 to 16 tokens, 0\.\d\d M parameters trained", said)
    assert "41 photographs; 3500 steps of 16 are 1750.0 epochs" in said
    assert "memory per worker" in said
    assert not run.exists()


def test_train_falls_back_from_a_damaged_checkpoint(photographs, base, tmp_path, capsys):
    """With a damaged last checkpoint, training resumes at the one before and ends with the same weights."""
    run = tmp_path / "run"
    common = ["train", "distill", str(photographs), str(run), *OPTIONS, "--init", str(base), "--no-ray"]
    main([*common, "--checkpoint-every", "3", "--steps", "6"])
    whole = tensors(run)
    newest_file = sorted((run / "checkpoints").glob("*.pt"))[-1]
    newest_file.write_bytes(newest_file.read_bytes()[:1000])
    capsys.readouterr()
    main([*common, "--checkpoint-every", "3", "--steps", "6"])
    said = capsys.readouterr().err
    assert "is damaged" in said
    assert "going on at step 3" in said
    assert_same(tensors(run), whole)
