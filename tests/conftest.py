"""Type checks of alit's annotations, tensor shapes included; shared fixtures; lanes of parallel runs; skips.

In CI (`ALIT_STRICT_SKIPS=1`) the run fails when a test is skipped for a reason that `skips_allowed.txt` does not name.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import s3_server
import torch
from paths import ROOT, SHARED, TESTS

# Before anything imports alit. The tower: an int is welcome where a float is asked for, as static checkers have it.
jaxtyping.install_import_hook("alit", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

LANES = {"tests/serve/": "service", "tests/jobs/submission/": "cluster"}
"""Folders whose tests share what takes seconds to start, and the lane that they run in."""


HINTS = {
    "../shared": "photographs and schemas in a folder `shared` beside the checkout",
    "network namespaces": "root, and iproute2",
    "prometheus": "Debian's package prometheus, or a release of it on PATH",
    "kubectl": "kubectl on PATH",
    "chromium": "Debian's package chromium",
    "small disk": "root",
}
"""How to get what a skipped test needs, by a word of its reason."""


@cache
def lane(path: str) -> str:
    """Returns the lane of a test file: each process of a parallel run takes one whole lane after the other.

    So what several files share is started once: a service, a cluster, or Ray, in all files that name `ray_session`.
    """
    shared = (name for folder, name in LANES.items() if path.startswith(folder))
    return next(shared, "ray" if "ray_session" in (ROOT / path).read_text() else path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Schedules by lane."""
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return lane(nodeid.partition("::")[0])

    return Lanes(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests by lane, the longest ones first."""
    order = ["ray", *LANES.values(), "tests/end_to_end/test_training.py"]
    lanes = {item: lane(str(item.path.relative_to(ROOT))) for item in items}
    items.sort(key=lambda item: order.index(lanes[item]) if lanes[item] in order else len(order))


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
def ray_session() -> Iterator[str]:
    """The address of a Ray on this machine, for all tests that need one; this process is connected to it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.ENVIRONMENT.items():  # its workers reach the buckets of all tests
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=300 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
        )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def bucket(tmp_path_factory):
    """A bucket `photos`: the URI's query that reaches it, the folder behind it, and the server's log.

    All tests of a run share it, so each of them has a folder of its own in it.
    """
    with s3_server.s3_server(tmp_path_factory.mktemp("s3")) as found:
        yield found


def _skips(config: pytest.Config) -> dict[str, str]:
    """Returns the reasons of this run's skipped tests, by test."""
    reports = config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    return {report.nodeid: str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports}


def _unexpected_skips(config: pytest.Config) -> list[str]:
    if os.environ.get("ALIT_STRICT_SKIPS") != "1":
        return []
    lines = (TESTS / "skips_allowed.txt").read_text().splitlines()
    allowed = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [f"{test}: {why}" for test, why in _skips(config).items() if not any(part in why for part in allowed)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # a process of a parallel run: its controller counts the skips
        return
    if session.exitstatus == pytest.ExitCode.OK and _unexpected_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if reasons := Counter(_skips(config).values()):
        terminalreporter.section("skipped")
        for reason, count in reasons.items():
            hints = [hint for word, hint in HINTS.items() if word in reason.lower()]
            terminalreporter.write_line(f"{count} x {reason}" + (f" (to run: {hints[0]})" if hints else ""))
    if skips := _unexpected_skips(config):
        terminalreporter.section("skipped for a reason that tests/skips_allowed.txt does not name", red=True)
        terminalreporter.write_line("\n".join(skips))
