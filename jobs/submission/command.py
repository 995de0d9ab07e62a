"""The command `alit submit`."""

from __future__ import annotations

import sys
from typing import Annotated

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
    """Run a command on a Ray cluster: put `submit`, and options of its own if any, before it.

    INPUT, OUTPUT, weights and run folders must lie where the cluster's nodes see them: s3://, or a shared disk.

    Example: alit submit --address http://head:8265 tokenize s3://bucket/photos s3://bucket/tokens --workers 8

    Args:
        follow_job: Show the log of this job, submitted before.
        stop_job: Stop this job, submitted before.
    """
    from jobs.submission import client

    if stop_job is not None:
        client.stop(stop_job, options.address)
    elif follow_job is not None:
        sys.exit(client.resume(follow_job, options.address))
    else:
        raise AlitError(
            "name the command to submit, such as: alit submit tokenize s3://bucket/photos s3://bucket/tokens"
        )
