"""Options of `alit submit`; imports neither torch nor Ray, so that help answers at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitOptions:
    """Where and how a command runs on a Ray cluster.

    Attributes:
        address: URL of the cluster's dashboard, such as http://head:8265; defaults to RAY_API_SERVER_ADDRESS, or else
            this machine's dashboard.
        name: Name of the job, unique on the cluster; generated when not given.
        env: Names of environment variables to copy from this machine to the job, such as --env AWS_REGION HF_HOME.
            Anyone with access to the cluster's dashboard can read them: it is better to set secrets on the nodes.
        labels: Labels of the node that the command itself runs on, such as --labels tier=cpu; the head by default.
        cpus: Logical CPUs that the command reserves on that node.
        upload: Upload this version of the code; with --no-upload the nodes' own version is used.
        follow: Print the job's log until it ends, and exit with its exit code; --no-follow prints only its name.
    """

    address: str | None = None
    name: str | None = None
    env: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    cpus: float = 0
    upload: bool = True
    follow: bool = True
