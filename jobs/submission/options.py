"""Options of `alit submit`, without torch or Ray, so that help answers at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitOptions:
    """All but the command.

    Attributes:
        address: Of the cluster's dashboard, such as http://head:8265; RAY_API_SERVER_ADDRESS when not given, else this
            machine's.
        name: Of the job, unique on the cluster; one is made up when not given.
        env: Names of environment variables whose values here the job gets, such as --env AWS_REGION HF_HOME. Whoever
            may look at the cluster's dashboard can read them: secrets are better given to the nodes.
        labels: Where the command itself runs, by the nodes' labels, such as --labels tier=cpu; on the head otherwise.
        cpus: Logical CPUs that it takes there.
        upload: Send this version of the code; with --no-upload the nodes' own is used.
        follow: Show the job's log until it ends, and end with its exit code; with --no-follow only its name is printed.
    """

    address: str | None = None
    name: str | None = None
    env: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    cpus: float = 0
    upload: bool = True
    follow: bool = True
