"""`alit serve`: the service on this machine, in one command."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from alit.errors import ConfigError
from alit.weights import load_weights
from serve.config import read_settings
from serve.doors import KEYS, read_keys


def run(config: Path | None, changes: dict[str, Any]) -> None:
    """Serves until it is interrupted or asked to end, and then finishes what it works on.

    Args:
        config: a YAML file of settings.
        changes: settings that replace the file's.

    Raises:
        ConfigError: settings that cannot be, or a door that would stand open.
        WeightsError: a weights folder that cannot be loaded.
    """
    started = time.monotonic()
    settings, where = read_settings(config, changes)
    keys = read_keys(settings)
    if not keys and not where.loopback:
        raise ConfigError(
            f"without keys the service listens on this machine alone; to listen on {where.host}, name keys with "
            f"--keys-file, or in {KEYS}=name:key"
        )
    for folder in settings.models.values():
        load_weights(folder)  # here too: what is wrong costs a sentence, not a start
    absolute = {name: folder and str(Path(folder).resolve()) for name, folder in settings.models.items()}
    settings = settings.model_copy(
        update={"models": absolute, "keys_file": settings.keys_file and str(Path(settings.keys_file).resolve())}
    )
    os.chdir(tempfile.mkdtemp(prefix="alit-serve-"))  # Ray's workers would find a user's own `serve` in this folder
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray
    from ray import serve

    from serve.app import build

    ended = threading.Event()
    cpus = settings.threads * settings.max_replicas + settings.api_replicas + 2
    ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which sets its own
        signal.signal(number, lambda *_: ended.set())
    try:
        serve.start(
            http_options={
                "host": where.host,
                "port": where.port,
                "request_timeout_s": settings.deadline_seconds + 10,
                "keep_alive_timeout_s": 30,
            },
            logging_config={"enable_access_log": False},
        )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.run(build(settings), name="alit", route_prefix="/")
        seconds = time.monotonic() - started
        print(
            f"alit: ready after {seconds:.1f} s at http://{where.host}:{where.port}/ (the playground)", file=sys.stderr
        )
        ended.wait()
        print("alit: finishing what is under way", file=sys.stderr)
    finally:
        serve.shutdown()
        ray.shutdown()
