"""`alit serve`: the service on this machine, in one command."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from alit.errors import AlitError, ConfigError
from alit.weights import load_weights
from serve.access import KEYS, read_keys
from serve.settings import ListenAddress, Settings, is_loopback, read_settings


class Asked(threading.Event):
    """What signals ask for: to end, or first to read the settings again."""

    again = False

    def end(self, *_: Any) -> None:
        self.set()

    def reload(self, *_: Any) -> None:
        self.again = True
        self.set()


def run(config: Path | None, changes: dict[str, Any]) -> None:
    """Serves until it is interrupted or asked to end, and then finishes what it works on.

    SIGHUP makes it read the settings again: new processes take over from the old ones, which finish their requests.

    Args:
        config: a YAML file of settings.
        changes: settings that replace the file's.

    Raises:
        ConfigError: settings that cannot be, or a door that would stand open.
        WeightsError: a weights folder that cannot be loaded.
    """
    started = time.monotonic()
    config = config and config.resolve()
    here = Path.cwd()
    settings, where = checked(config, changes, here)
    os.chdir(tempfile.mkdtemp(prefix="alit-serve-"))  # Ray's workers would find a user's own `serve` in this folder
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray
    from ray import serve

    logs = {"encoding": "JSON", "enable_access_log": False, "log_level": "WARNING", "logs_dir": where.logs_dir}
    asked = Asked()
    room = needed(settings)
    with silence():
        ray.init(
            "local",
            # one more of each while others take over
            num_cpus=room + settings.threads + settings.api_replicas,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _metrics_export_port=where.metrics_port,
        )
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which sets its own
        signal.signal(number, asked.end)
    signal.signal(signal.SIGHUP, asked.reload)
    try:
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # here; its processes have their own
        serve.start(
            http_options={
                "host": where.host,
                "port": where.port,
                "request_timeout_s": settings.deadline_seconds + 10,
                "keep_alive_timeout_s": 30,
            },
            logging_config=logs,
        )
        if not deploy(settings, logs, asked):
            raise ConfigError("the service could not be started; its log files say why")
        if not asked.is_set():
            seconds = time.monotonic() - started
            say(f"ready after {seconds:.1f} s at http://{where.host}:{where.port}/ (the playground)")
        while asked.wait() and asked.again:
            asked.again = False
            asked.clear()
            try:
                new, place = checked(config, changes, here)
                if needed(new) > room:
                    raise ConfigError("more processes or threads than there were need a start anew")
            except AlitError as error:
                say(f"the old settings stay: {error}")
                continue
            if deploy(new, logs, asked):
                settings = new
                say("the new settings are in force" + (", but for host, port and files" if place != where else ""))
            else:
                deploy(settings, logs, asked)
                say("the old settings stay: the service did not start with the new ones; its log files say why")
        say("finishing what is under way")
        with silence():
            serve.delete("alit")  # while the proxy lives: what is under way is answered
    finally:
        with silence():
            serve.shutdown()
            ray.shutdown()


def needed(settings: Settings) -> int:
    """Logical CPUs of all its processes."""
    return settings.threads * settings.max_replicas + settings.api_replicas


def deploy(settings: Settings, logs: dict[str, Any], asked: Asked) -> bool:
    """Starts or replaces the processes; whether they came up before something else was asked for."""
    from ray import serve

    from serve.app import build

    application = serve.RunTarget(build(settings), name="alit", route_prefix="/", logging_config=logs)
    serve.run_many([application], wait_for_applications_running=False, wait_for_ingress_deployment_creation=False)
    while not asked.wait(0.2):
        status = serve.status().applications["alit"].status
        if status in ("RUNNING", "DEPLOY_FAILED"):
            return status == "RUNNING"
    return True


@contextmanager
def silence() -> Iterator[None]:
    """Shows nothing of what Ray's own processes say as they come and go: it helps nobody."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    with open(os.devnull, "wb") as nowhere:
        for number in kept:
            os.dup2(nowhere.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


def say(words: str) -> None:
    print(f"alit: {words}", file=sys.stderr, flush=True)


def checked(config: Path | None, changes: dict[str, Any], here: Path) -> tuple[Settings, ListenAddress]:
    """Settings whose files were looked at: what is wrong costs a sentence, not a start. Paths become absolute.

    Args:
        here: where relative paths begin.
    """
    settings, where = read_settings(config, changes)
    paths = {name: folder and str(here / folder) for name, folder in settings.models.items()}
    keys_file = settings.keys_file and str(here / settings.keys_file)
    where = where.model_copy(update={"logs_dir": where.logs_dir and str(here / where.logs_dir)})
    settings = settings.model_copy(update={"models": paths, "keys_file": keys_file})
    if not (read_keys(settings) or settings.keyless or is_loopback(where.host)):
        raise ConfigError(
            f"without keys the service listens on this machine alone; to listen on {where.host}, name keys with "
            f"--keys-file, or in {KEYS}=name:key"
        )
    if is_loopback(where.host):
        settings = settings.model_copy(update={"keyless": True})  # nobody else can come to this address
    if (wanted := settings.gpus_per_replica * settings.max_replicas) > torch.cuda.device_count():
        raise ConfigError(f"the settings ask for {wanted:g} GPUs, and this machine has {torch.cuda.device_count()}")
    for folder in settings.models.values():
        load_weights(folder)
    return settings, where
