"""The command `alit submit`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from tyro.conf import arg

from alit.errors import AlitError
from jobs.submission.options import SubmitOptions

SUBMIT_DEFAULTS = SubmitOptions()


def submit(
    *,
    options: Annotated[SubmitOptions, arg(name="")] = SUBMIT_DEFAULTS,
    follow_job: str | None = None,
    stop_job: str | None = None,
) -> None:
    """Run a command on a Ray cluster: put `submit`, and its own options if any, before the command.

    INPUT, OUTPUT, weights and run folders must be accessible from the cluster's nodes: s3://, or a shared disk.

    Example: alit submit --address http://head:8265 tokenize s3://bucket/photos s3://bucket/tokens --workers 8

    Args:
        options: Where and how the command runs.
        follow_job: Follow the log of a job that was submitted earlier.
        stop_job: Stop a job that was submitted earlier.
    """
    from jobs.submission import client

    if stop_job is not None:
        client.stop(stop_job, options.address)
    elif follow_job is not None:
        sys.exit(client.follow(follow_job, options.address))
    else:
        raise AlitError(
            "name the command to submit, such as: alit submit tokenize s3://bucket/photos s3://bucket/tokens"
        )


def run_submit(arguments: Sequence[str], commands: Sequence[str]) -> None:
    """Runs `alit submit [OPTIONS] COMMAND …`, and exits with the exit code of the job.

    Args:
        arguments: The words after `submit`: options of `submit`, then the command with its own options.
        commands: The names of the commands that can be submitted.

    Raises:
        AlitError: there is no command or an unknown one, or the cluster cannot be reached or refuses the job.
    """
    end = next((i for i, word in enumerate(arguments) if word in commands or word == "--"), len(arguments))
    own, command = arguments[:end], arguments[end:]
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        tyro.cli(submit, args=own, prog="alit submit")
        return
    if command[0] not in commands:
        raise AlitError(f"submit takes one of {', '.join(commands)}, got {command[0]!r}")
    from jobs.submission import client

    sys.exit(client.submit(command, tyro.cli(SubmitOptions, args=own, prog="alit submit")))
