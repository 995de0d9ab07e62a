"""Client of a Ray cluster: submits a command with this version of the code, and follows its log and exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import alit
from alit.errors import AlitError
from jobs.runtime.placement import parse_labels
from jobs.submission.options import SubmitOptions

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"


PACKAGES = ("alit", "jobs", "serve")


EXIT_STOPPED = 130
"""Exit code if the job was stopped, or following it was interrupted."""


PENDING_WARNING_SECONDS = 5.0
"""The user is informed why a job has not started after this many seconds."""


FOLLOW_HINT = (
    "; the job may still be running: alit submit --follow-job NAME follows its log once the cluster answers again"
)


def submit(command: Sequence[str], options: SubmitOptions) -> int:
    """Runs `alit COMMAND` on a cluster.

    Args:
        command: The words after `alit`.
        options: Where and how the command runs.

    Returns:
        The exit code of the job, or 0 if its log is not followed.

    Raises:
        AlitError: the cluster cannot be reached or refuses the job, or a variable is not set.
    """
    unset = [name for name in options.env if name not in os.environ]
    if unset:
        raise AlitError(f"--env {unset[0]}: this variable is not set here")
    environment: dict[str, Any] = {"env_vars": {name: os.environ[name] for name in options.env}}
    if options.upload:
        root = Path(alit.__file__).parents[1]
        environment |= {"py_modules": [str(root / name) for name in PACKAGES], "excludes": ["__pycache__/"]}
    selector = parse_labels("--labels", options.labels)
    client = connect(options.address)
    with translate_client_errors():
        name = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "jobs.cli", *command]),
            submission_id=options.name,
            runtime_env=environment,
            metadata={"alit": alit.__version__},
            entrypoint_num_cpus=options.cpus or None,
            entrypoint_label_selector=selector or None,
        )
    if not options.follow:
        print(name)
        return 0
    _log(f"job {name}; it keeps running if this command is interrupted")
    return _follow(client, name)


def follow(name: str, address: str | None) -> int:
    """Prints the log of a job that was submitted earlier, until it ends.

    Args:
        name: The job's name.
        address: The URL of the cluster's dashboard, see `connect`.

    Returns:
        The exit code of the job.

    Raises:
        AlitError: the cluster cannot be reached, or has no such job.
    """
    return _follow(connect(address), name)


def stop(name: str, address: str | None) -> None:
    """Stops a job as SIGTERM does: the files that it has written stay, and the same command resumes it.

    Args:
        name: The job's name.
        address: The URL of the cluster's dashboard, see `connect`.

    Raises:
        AlitError: the cluster cannot be reached, or has no such job.
    """
    client = connect(address)
    with translate_client_errors():
        pending = str(client.get_job_status(name)) == "PENDING"
        stopped = client.stop_job(name)
    if pending and stopped:  # Ray records the request, but there is no process to stop yet
        state = "has not started: it ends when it would start, or when Ray gives it up (900 s by default)"
    else:
        state = "is being stopped" if stopped else "had already ended"
    _log(f"{name} {state}")


def _log(message: str) -> None:
    print(f"alit: {message}", file=sys.stderr)


def _follow(client: Any, name: str) -> int:
    """Prints a job's log until the job ends, and returns its exit code."""

    async def print_log() -> None:
        log = client.tail_job_logs(name)
        while True:
            with translate_client_errors(hint=FOLLOW_HINT):
                lines = await anext(log, None)
            if lines is None:
                return
            print(lines, end="", flush=True)

    try:
        with translate_client_errors(hint=FOLLOW_HINT):
            _await_start(client, name)
        asyncio.run(print_log())
        with translate_client_errors(hint=FOLLOW_HINT):
            while not (info := client.get_job_info(name)).status.is_terminal():
                time.sleep(1)  # the log ends before the job if the agent that reads it does
    except KeyboardInterrupt:
        print(file=sys.stderr)
        _log(
            f"job {name} keeps running; alit submit --follow-job {name} follows its log again, "
            f"alit submit --stop-job {name} stops it"
        )
        return EXIT_STOPPED
    return _exit_code(name, info)


def _exit_code(name: str, info: Any) -> int:
    """Returns the exit code of a job that has ended, and logs why it did not succeed."""
    match str(info.status):
        case "SUCCEEDED":
            return 0
        case "STOPPED":
            _log(f"job {name} was stopped")
            return EXIT_STOPPED
    code: int | None = info.driver_exit_code
    if code is None:
        _log(f"job {name} failed: {_error_summary(info.message)}")
        return 1
    if code < 0:
        code = 128 - code  # the convention of shells
    _log(f"job {name} " + (f"was ended by signal {code - 128}" if code > 128 else f"failed with exit code {code}"))
    return code or 1


def _await_start(client: Any, name: str) -> None:
    """Waits until a job has started or ended, and logs the possible reasons if that takes long."""
    deadline = time.monotonic() + PENDING_WARNING_SECONDS
    warned = False
    while str(client.get_job_status(name)) == "PENDING":
        if not warned and time.monotonic() > deadline:
            _log(
                f"job {name} has not started: it waits for a node that satisfies --labels and --cpus, or for its "
                "environment to be built"
            )
            warned = True
        time.sleep(0.5)


def connect(address: str | None) -> Any:
    """Connects to a cluster's job server and returns Ray's client.

    Args:
        address: The URL of the cluster's dashboard; by default `RAY_API_SERVER_ADDRESS`, else this machine's.

    Raises:
        AlitError: there is no such server, or the token is wrong.
    """
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):  # they log every package and connection
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
    url = address or os.environ.get(ADDRESS_VARIABLE) or "http://127.0.0.1:8265"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise AlitError(f"--address must be the URL of the cluster's dashboard, such as http://head:8265, got {url!r}")
    try:  # Ray's client would wait minutes for a machine that does not exist
        with socket.create_connection((parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), 10):
            pass
    except OSError as error:
        raise AlitError(
            f"cannot connect to {url} ({error}); name the cluster's dashboard with --address or {ADDRESS_VARIABLE}"
        ) from error
    with translate_client_errors():
        return JobSubmissionClient(url)


@contextmanager
def translate_client_errors(hint: str = "") -> Iterator[None]:
    """Converts the exceptions of Ray's client to `AlitError`.

    Args:
        hint: Appended to the message if the cluster does not answer.
    """
    import requests
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise AlitError(
            "the cluster asks for its token: set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN, or "
            "its file in RAY_AUTH_TOKEN_PATH"
        ) from error
    except (RuntimeError, ValueError, ConnectionError, requests.RequestException, ClientError) as error:
        summary = _error_summary(str(error)) or type(error).__name__
        lost = (ConnectionError, requests.ConnectionError, requests.Timeout, ClientError)
        if isinstance(error, lost) or "WebSocket" in summary:
            raise AlitError(f"the cluster does not answer: {summary}{hint}") from error
        raise AlitError(f"the cluster refuses: {summary}") from error


def _error_summary(text: str) -> str:
    """Returns the most informative line of an error: the last one with a message if the text is a traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error: " in line), (lines or [""])[-1])[:500]
