"""`alit submit`: the same command on a Ray cluster, with this version of the code, its log and its exit code here."""

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
from jobs.runtime.placement import labels
from jobs.submission.options import SubmitOptions

ADDRESS = "RAY_API_SERVER_ADDRESS"
PACKAGES = ("alit", "jobs", "serve")
STOPPED = 130
PENDING = 5.0
"""Seconds after which a person would like to know why a job does not begin."""
GOES_ON = "; the job may go on, and alit submit --follow-job NAME shows it once the cluster answers again"


def submit(command: Sequence[str], options: SubmitOptions) -> int:
    """Runs `alit COMMAND` on a cluster; the exit code of the job, 0 where it is not followed.

    Raises:
        AlitError: the cluster cannot be reached or refuses, or a variable is not set.
    """
    unset = [name for name in options.env if name not in os.environ]
    if unset:
        raise AlitError(f"--env {unset[0]}: this variable is not set here")
    environment: dict[str, Any] = {"env_vars": {name: os.environ[name] for name in options.env}}
    if options.upload:
        root = Path(alit.__file__).parents[1]
        environment |= {"py_modules": [str(root / name) for name in PACKAGES], "excludes": ["__pycache__/"]}
    selector = labels("--labels", options.labels)
    client = connect(options.address)
    with telling():
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
    print(f"alit: job {name}; it goes on if this command is interrupted", file=sys.stderr)
    return follow(client, name)


def resume(name: str, address: str | None) -> int:
    """Shows the log of a job that was submitted before, and returns its exit code."""
    return follow(connect(address), name)


def stop(name: str, address: str | None) -> None:
    """Stops a job, as SIGTERM would: what it has written stays, and the same command goes on."""
    client = connect(address)
    with telling():
        pending = str(client.get_job_status(name)) == "PENDING"
        stopped = client.stop_job(name)
    if pending and stopped:  # Ray asks a process to stop it that is not there yet
        said = "has not begun: it ends when it would begin, or when Ray gives it up (900 s by default)"
    else:
        said = "is being stopped" if stopped else "had ended already"
    print(f"alit: {name} {said}", file=sys.stderr)


def follow(client: Any, name: str) -> int:
    """Prints a job's log as it comes; its exit code once it has ended."""

    async def tail() -> None:
        log = client.tail_job_logs(name)
        while True:
            with telling(after=GOES_ON):
                lines = await anext(log, None)
            if lines is None:
                return
            print(lines, end="", flush=True)

    try:
        with telling(after=GOES_ON):
            _await_start(client, name)
        asyncio.run(tail())
        with telling(after=GOES_ON):
            while not (ended := client.get_job_info(name)).status.is_terminal():
                time.sleep(1)  # the log can end before the job: with the agent that reads it
    except KeyboardInterrupt:
        said = f"alit submit --follow-job {name} shows it again, alit submit --stop-job {name} stops it"
        print(f"\nalit: job {name} goes on; {said}", file=sys.stderr)
        return STOPPED
    match str(ended.status):
        case "SUCCEEDED":
            return 0
        case "STOPPED":
            print(f"alit: job {name} was stopped", file=sys.stderr)
            return STOPPED
    code: int | None = ended.driver_exit_code
    if code is None:
        print(f"alit: job {name} failed: {_gist(ended.message)}", file=sys.stderr)
        return 1
    if code < 0:
        code = 128 - code  # as a shell has it
    said = f"ended by signal {code - 128}" if code > 128 else f"failed with exit code {code}"
    print(f"alit: job {name} {said}", file=sys.stderr)
    return code or 1


def _await_start(client: Any, name: str) -> None:
    """Waits until a job is under way or over, and says why it is not, where that takes long."""
    until = time.monotonic() + PENDING
    while str(client.get_job_status(name)) == "PENDING":
        if until and time.monotonic() > until:
            said = "it waits for a node that has what --labels and --cpus ask for, or for its environment to be built"
            print(f"alit: job {name} has not begun: {said}", file=sys.stderr)
            until = 0.0
        time.sleep(0.5)


def connect(address: str | None) -> Any:
    """The cluster's job server.

    Raises:
        AlitError: nobody answers, or it is no such server, or the token is wrong.
    """
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):  # they tell of every package and connection
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
    url = address or os.environ.get(ADDRESS) or "http://127.0.0.1:8265"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise AlitError(f"--address must be the URL of the cluster's dashboard, such as http://head:8265, got {url!r}")
    try:  # the client itself would wait for minutes for a machine that is not there
        with socket.create_connection((parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), 10):
            pass
    except OSError as error:
        raise AlitError(
            f"nobody answers at {url} ({error}); name the cluster's dashboard with --address or {ADDRESS}"
        ) from error
    with telling():
        return JobSubmissionClient(url)


@contextmanager
def telling(after: str = "") -> Iterator[None]:
    """Turns what Ray's client raises into sentences.

    Args:
        after: what to add where the cluster does not answer.
    """
    import requests
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        said = "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN, or its file in RAY_AUTH_TOKEN_PATH"
        raise AlitError(f"the cluster asks for its token: {said}") from error
    except (RuntimeError, ValueError, ConnectionError, requests.RequestException, ClientError) as error:
        said = _gist(str(error)) or type(error).__name__
        lost = (ConnectionError, requests.ConnectionError, requests.Timeout, ClientError)
        if isinstance(error, lost) or "WebSocket" in said:
            raise AlitError(f"the cluster does not answer: {said}{after}") from error
        raise AlitError(f"the cluster refuses: {said}") from error


def _gist(text: str) -> str:
    """The line that says what is wrong: of a traceback the last one that is a message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error: " in line), (lines or [""])[-1])[:500]
