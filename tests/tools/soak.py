"""Kills a running `alit tokenize` again and again, and compares what comes out with an undisturbed run, byte for byte.

    python tests/tools/soak.py INPUT WORK [--kills driver actor rename node driver] [--rows-per-file 256] [--s3]

The job runs on a Ray cluster of two nodes on this machine. Each kill comes when a share of the files is there, which
grows from kill to kill. With --s3, input and output lie on a real S3 server, behind a proxy that fails one request in
twenty. `make test` runs a short form of it (`tests/test_survival.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paths import ROOT, TESTS
from processes import named

ENVIRONMENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "PYTHONPATH": f"{ROOT}:{TESTS / 'support'}",
}
KINDS = ("driver", "actor", "worker", "rename", "node", "terminate")


@dataclass
class Result:
    """What a disturbed run came to."""

    images: int = 0
    kills: list[str] = field(default_factory=list)
    encoded: int = 0
    different: list[str] = field(default_factory=list)
    recovery: list[float] = field(default_factory=list)

    @property
    def encoded_again(self) -> int:
        return self.encoded - self.images


def finished(output: Path) -> int:
    """How many of a dataset's shards are written."""
    found = (
        set(os.listdir(output / folder)) if (output / folder).is_dir() else set() for folder in ("data", "_rejects")
    )
    data, rejects = found
    return len([name for name in data & rejects if not name.startswith(".")])


class Run:
    """One `alit tokenize` under attack."""

    def __init__(self, arguments: Sequence[str], output: Path, log: Path, **environment: str) -> None:
        self.arguments, self.output, self.log = list(arguments), output, log
        self.encodings = log.with_suffix(".encoded")
        self.environment = os.environ | ENVIRONMENT | environment | {"ALIT_SOAK_LOG": str(self.encodings)}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, die_at_rename: bool = False) -> None:
        marker = self.log.with_suffix(f".died{random.randrange(1 << 30)}") if die_at_rename else ""
        with self.log.open("ab") as log:
            command = [sys.executable, str(Path(__file__)), "--job", str(marker), *self.arguments]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)

    def wait_until(self, condition: Callable[[], bool], patience: float = 600) -> None:
        until = time.monotonic() + patience
        while not condition():
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
            assert time.monotonic() < until, f"nothing for {patience} s:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)

    def kill(self, kind: str, lose_node: Callable[[], None] | None = None) -> None:
        assert self.process is not None
        if kind in ("driver", "terminate"):
            self.process.send_signal(signal.SIGKILL if kind == "driver" else signal.SIGTERM)
            started = time.monotonic()
            code = self.process.wait(60)
            if kind == "terminate":
                assert code == 143, (code, self.log.read_text()[-2000:])
                assert time.monotonic() - started < 30
            self.process = None
        elif kind == "actor":
            os.kill(named(os.getpid(), "Tokenizer")[0], signal.SIGKILL)
        elif kind == "worker":
            os.kill(random.choice(named(os.getpid(), "ray::")), signal.SIGKILL)
        elif kind == "node":
            assert lose_node is not None
            lose_node()
        else:
            raise AssertionError(kind)

    def images_encoded(self) -> int:
        return sum(map(int, self.encodings.read_text().split())) if self.encodings.exists() else 0


def attack(run: Run, shards: int, kills: Sequence[str], lose_node: Callable[[], None] | None = None) -> Result:
    """Runs the job to its end, disturbing it when 10 to 90 % of its shards are written."""
    result = Result()
    for i, kind in enumerate(kills):
        share = 0.1 + 0.8 * (i + 0.5) / len(kills)
        if run.process is None:
            run.start(die_at_rename=kind == "rename")
        elif kind == "rename":  # the hook is the driver's: begin again with it
            run.kill("terminate")
            run.start(die_at_rename=True)
        reached = max(finished(run.output) + (0 if run.output.exists() else 1), int(share * shards))
        if kind == "rename":
            deaths = len(list(run.log.parent.glob("*.died*")))
            run.wait_until(lambda deaths=deaths: len(list(run.log.parent.glob("*.died*"))) > deaths)
        else:
            run.wait_until(lambda reached=reached: finished(run.output) >= reached)
            run.kill(kind, lose_node)
        before, started = finished(run.output), time.monotonic()
        result.kills.append(f"{kind} at {before} of {shards}")
        print(result.kills[-1], flush=True)
        if run.process is None:
            run.start(die_at_rename=kinds_after(kills, i) == "rename")
        run.wait_until(lambda before=before: finished(run.output) > before or (run.output / "_manifest.json").exists())
        result.recovery.append(time.monotonic() - started)
    assert run.process is not None
    assert run.process.wait(3600) == 0, run.log.read_text()[-3000:]
    result.encoded = run.images_encoded()
    return result


def kinds_after(kills: Sequence[str], i: int) -> str:
    return kills[i + 1] if i + 1 < len(kills) else ""


def compare(disturbed: Path, whole: Path, result: Result) -> None:
    """Fills in which files differ."""
    names = {str(path.relative_to(root)) for root in (disturbed, whole) for path in root.rglob("*") if path.is_file()}
    for name in sorted(names):
        files = [root / name for root in (disturbed, whole)]
        if not all(f.is_file() for f in files) or files[0].read_bytes() != files[1].read_bytes():
            result.different.append(name)
    manifest = json.loads((whole / "_manifest.json").read_text())
    result.images = manifest["images"]


# -------------------------------------------------------------------- the job, with its hooks


def job(marker: str, arguments: list[str]) -> None:
    """`alit` itself, which logs how many images it encodes and, once, dies between temporary file and rename."""
    import jobs.storage.path
    import jobs.tokenization.shard
    from jobs.cli import main

    encoded_batches, log = jobs.tokenization.shard.encoded_batches, os.environ["ALIT_SOAK_LOG"]

    def counted(*given: Any) -> Any:
        for decoded, encoded in encoded_batches(*given):
            with open(log, "a") as file:
                file.write(f"{len(encoded)}\n")
            yield decoded, encoded

    jobs.tokenization.shard.encoded_batches = counted
    if marker:
        plain = type(Path())

        class Dying(plain):
            def replace(self, target: Any) -> Any:
                if "data" in self.parts and not os.path.exists(marker):
                    with open(marker, "x"):
                        os.kill(os.getpid(), signal.SIGKILL)
                return plain.replace(self, target)

        jobs.storage.path.Path = Dying
    main(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input")
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", nargs="+", choices=KINDS, default=["driver", "actor", "rename", "node", "driver"])
    parser.add_argument("--rows-per-file", type=int, default=256)
    parser.add_argument("--criterion", default="fixed:16")
    parser.add_argument("--s3", action="store_true", help="through a failing network; INPUT is a folder then")
    given = parser.parse_args()
    given.work.mkdir(parents=True)
    os.environ.update(ENVIRONMENT)
    from flaky_proxy import FlakyProxy
    from ray.cluster_utils import Cluster
    from s3_server import s3_server

    def arguments(source: str, output: str) -> list[str]:
        options = ["--criterion", given.criterion, "--rows-per-file", str(given.rows_per_file), "--workers", "2"]
        return ["tokenize", source, output, *options]

    started = time.monotonic()
    undisturbed = Run(arguments(given.input, str(given.work / "whole")), given.work / "whole", given.work / "whole.log")
    undisturbed.start()
    assert undisturbed.process is not None
    assert undisturbed.process.wait() == 0, undisturbed.log.read_text()[-3000:]
    shards = finished(given.work / "whole")
    print(f"undisturbed: {shards} shards in {time.monotonic() - started:.0f} s", flush=True)

    stack = ExitStack()
    source, output, hit, proxy = given.input, str(given.work / "hit"), given.work / "hit", None
    if given.s3:
        query, folder, _ = stack.enter_context(s3_server(given.work / "s3"))
        shutil.copytree(given.input, folder / "in")
        proxy = stack.enter_context(FlakyProxy(query.partition("http://")[2].partition("&")[0], stall=10))
        options = f"endpoint=http://{proxy.address}&region=us-east-1&timeout=5"
        source, output, hit = f"s3://photos/in?{options}", f"s3://photos/out?{options}", folder / "out"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=2)]

    def lose_node() -> None:
        nodes.append(cluster.add_node(num_cpus=2))
        cluster.remove_node(nodes.pop(0), allow_graceful=False)

    try:
        started = time.monotonic()
        run = Run(arguments(source, output), hit, given.work / "hit.log", RAY_ADDRESS=cluster.address)
        result = attack(run, shards, given.kills, lose_node)
        seconds = time.monotonic() - started
    finally:
        cluster.shutdown()
        stack.close()
    compare(hit, given.work / "whole", result)
    if proxy is not None:
        print(f"the network: {proxy.faults}")
        result.different.remove("_job.json")  # which names the input
    in_flight = 2 * given.rows_per_file * len(given.kills)
    print(f"{result.images} images in {seconds:.0f} s under attack: {', '.join(result.kills)}")
    print(f"next file after a kill: {', '.join(f'{s:.0f} s' for s in result.recovery)}")
    print(f"files that differ from the undisturbed run's: {result.different or 'none'}")
    print(f"encoded again: {result.encoded_again} images; in flight at the kills at most {in_flight}")
    sys.exit(bool(result.different) or result.encoded_again > in_flight)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        job(sys.argv[2], sys.argv[3:])
    else:
        main()
