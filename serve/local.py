"""`alit serve`: the service on this machine, in one command."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from alit.errors import AlitError, ConfigError
from alit.weights import load_weights
from serve.access import KEYS_VARIABLE, read_keys
from serve.settings import ListenAddress, Settings, is_loopback, read_settings


class SignalHandler(threading.Event):
    """An event that is set when a signal requests a shutdown or a reload of the settings."""

    shutdown_requested = False

    def install(self) -> None:
        """Handles SIGTERM and SIGINT as shutdown, and SIGHUP as reload."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._request_shutdown())
        signal.signal(signal.SIGHUP, lambda *_: self.set())

    def _request_shutdown(self) -> None:
        self.shutdown_requested = True
        self.set()

    def wait_for_reload(self) -> bool:
        """Waits for the next request; returns True for a reload and False for a shutdown."""
        self.wait()
        self.clear()
        return not self.shutdown_requested


def run(config: Path | None, changes: dict[str, Any]) -> None:
    """Serves until SIGTERM or SIGINT, and then shuts down gracefully: requests in progress are completed.

    SIGHUP reloads the settings: new processes replace the old ones, which complete their requests first.

    Args:
        config: A YAML file of settings.
        changes: Settings that override the file's.

    Raises:
        ConfigError: The settings are invalid, expose the service without API keys, or the service fails to start.
        WeightsError: A weights folder cannot be loaded.
    """
    started = time.monotonic()
    config, folder = config and config.resolve(), Path.cwd()
    settings, address = check_settings(config, changes, folder)
    os.chdir(tempfile.mkdtemp(prefix="alit-serve-"))  # Ray's workers would import a user's own `serve` from the folder
    with silence():
        start_ray(settings, address)
    from ray import serve

    signals = SignalHandler()
    signals.install()  # after Ray, which installs its own handlers
    try:
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # in this process; the others have their own
        logs = {"encoding": "JSON", "enable_access_log": False, "log_level": "WARNING", "logs_dir": address.logs_dir}
        serve.start(
            http_options={
                "host": address.host,
                "port": address.port,
                "request_timeout_s": settings.deadline_seconds + 10,
                "keep_alive_timeout_s": 30,
            },
            logging_config=logs,
        )
        if not deploy(settings, logs, signals):
            raise ConfigError("the service failed to start; see its log files for the cause")
        if not signals.is_set():
            seconds = time.monotonic() - started
            log(f"ready after {seconds:.1f} s at http://{address.host}:{address.port}/ (the playground)")
        reload_until_shutdown(settings, address, lambda: check_settings(config, changes, folder), logs, signals)
        log("completing the requests in progress")
        with silence():
            serve.delete("alit")  # while the proxy is alive, so that requests in progress are completed
    finally:
        with silence():
            shut_down()


def start_ray(settings: Settings, address: ListenAddress) -> None:
    """Starts Ray on this machine, with CPUs for all processes of the service and for replacements of each kind."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    ray.init(
        "local",
        num_cpus=required_cpus(settings) + settings.threads + settings.api_replicas,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _metrics_export_port=address.metrics_port,
    )


def shut_down() -> None:
    """Ends the service's processes and Ray."""
    import ray
    from ray import serve

    serve.shutdown()
    ray.shutdown()


def reload_until_shutdown(
    settings: Settings,
    address: ListenAddress,
    read: Callable[[], tuple[Settings, ListenAddress]],
    logs: dict[str, Any],
    signals: SignalHandler,
) -> None:
    """Deploys the settings anew on every request to reload, until a shutdown is requested.

    Args:
        settings: The settings of the running processes.
        address: The address that the service listens on, which a reload cannot change.
        read: Reads the settings again.
        logs: Serve's logging configuration.
        signals: The requests.
    """
    cpus = required_cpus(settings)
    while signals.wait_for_reload():
        try:
            new, new_address = read()
            if required_cpus(new) > cpus:
                raise ConfigError("more processes or threads than at the start require a restart")
        except AlitError as error:
            log(f"keeping the old settings: {error}")
            continue
        if deploy(new, logs, signals):
            settings = new
            log("using the new settings" + (", except host, port and files" if new_address != address else ""))
        else:
            deploy(settings, logs, signals)
            log("keeping the old settings: the service failed to start with the new ones; see its log files")


def required_cpus(settings: Settings) -> int:
    """Returns the number of logical CPUs of all processes of the service."""
    return settings.threads * settings.max_replicas + settings.api_replicas


def deploy(settings: Settings, logs: dict[str, Any], signals: SignalHandler) -> bool:
    """Starts the service's processes, or replaces them.

    Args:
        settings: The settings of the new processes.
        logs: Serve's logging configuration.
        signals: Ends the wait for the processes.

    Returns:
        False if the processes failed to start; True if they run, or if a signal came first.
    """
    from ray import serve

    from serve.app import build

    application = serve.RunTarget(build(settings), name="alit", route_prefix="/", logging_config=logs)
    serve.run_many([application], wait_for_applications_running=False, wait_for_ingress_deployment_creation=False)
    while not signals.wait(0.2):
        status = serve.status().applications["alit"].status
        if status in ("RUNNING", "DEPLOY_FAILED"):
            return status == "RUNNING"
    return True


@contextmanager
def silence() -> Iterator[None]:
    """Discards what Ray's own processes print while they start and exit, which helps no user."""
    sys.stdout.flush()
    sys.stderr.flush()
    copies = {number: os.dup(number) for number in (1, 2)}
    with open(os.devnull, "wb") as null:
        for number in copies:
            os.dup2(null.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, copy in copies.items():
            os.dup2(copy, number)
            os.close(copy)


def log(message: str) -> None:
    """Prints a message for the operator to standard error."""
    print(f"alit: {message}", file=sys.stderr, flush=True)


def check_settings(config: Path | None, changes: dict[str, Any], folder: Path) -> tuple[Settings, ListenAddress]:
    """Reads the settings and the files that they name, so that bad settings fail fast, before Ray starts.

    Args:
        config: A YAML file of settings.
        changes: Settings that override the file's.
        folder: The folder of relative paths.

    Returns:
        The settings with absolute paths, and the address to listen on.

    Raises:
        ConfigError: The settings are invalid, or expose the service without API keys.
        WeightsError: A weights folder cannot be loaded.
    """
    settings, address = read_settings(config, changes)
    models = {name: weights and str(folder / weights) for name, weights in settings.models.items()}
    keys_file = settings.keys_file and str(folder / settings.keys_file)
    address = address.model_copy(update={"logs_dir": address.logs_dir and str(folder / address.logs_dir)})
    settings = settings.model_copy(update={"models": models, "keys_file": keys_file})
    if not (read_keys(settings) or settings.keyless or is_loopback(address.host)):
        raise ConfigError(
            f"without API keys the service only listens on this machine; to listen on {address.host}, provide keys "
            f"with --keys-file, or in {KEYS_VARIABLE}=name:key"
        )
    if is_loopback(address.host):
        settings = settings.model_copy(update={"keyless": True})  # no other machine can reach this address
    gpus = settings.gpus_per_replica * settings.max_replicas
    if gpus > torch.cuda.device_count():
        raise ConfigError(f"the settings require {gpus:g} GPUs, and this machine has {torch.cuda.device_count()}")
    for weights in settings.models.values():
        load_weights(weights)
    return settings, address
