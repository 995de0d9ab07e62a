"""Type checks of alit's annotations, tensor shapes included; the fixtures that several files share; strict skips.

In CI (`ALIT_STRICT_SKIPS=1`) the run fails when a test is skipped for a reason that `skips_allowed.txt` does not name.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from paths import SHARED, TESTS
from s3_server import s3_server

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
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared (real photographs)")
    return SHARED


@pytest.fixture(scope="session")
def twelve_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 small PNGs, of noise."""
    from alit.images.encode import encode_image

    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(12):
        (folder / f"{number}.png").write_bytes(encode_image(random.integers(0, 256, (40, 40, 3), np.uint8)))
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
    with s3_server(tmp_path_factory.mktemp("s3")) as found:
        yield found


def _unexpected_skips(config: pytest.Config) -> list[str]:
    if os.environ.get("ALIT_STRICT_SKIPS") != "1":
        return []
    lines = (TESTS / "skips_allowed.txt").read_text().splitlines()
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
