"""Ray for a job: started or joined, quiet, with our code on every worker."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from alit.errors import AlitError
from jobs.runtime.process import local_cpus


def quiet_ray_data() -> None:
    """Keeps Ray Data's errors from the console of this process: they reach us as exceptions, and its log file has them.

    Its handlers are made with the first `DataContext`.
    """
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)


@contextmanager
def unwrapped(kind: type[AlitError] = AlitError) -> Iterator[None]:
    """Raises a worker's `AlitError` as it was there; Ray's own exception has its class and a page of traceback."""
    try:
        yield
    except AlitError as error:
        cause = getattr(error, "cause", error)
        raise (kind if cause is not error else type(error))(str(cause).splitlines()[0]) from None  # Ray adds lines


@contextmanager
def ray_session(cpus: int = 0) -> Iterator[Any]:
    """Ray, joined where `RAY_ADDRESS` names a cluster or one is already connected, else started on this machine.

    Args:
        cpus: logical ones that the job's actors take; where Ray is started here there will be more.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own announced default; it warns otherwise
    import ray
    from ray import cloudpickle

    import jobs

    # Ray puts the driver's folder first on its workers' path, where a user's own `jobs` would be found instead of ours
    cloudpickle.register_pickle_by_value(jobs)
    ours = not ray.is_initialized()
    alone = ours and not os.environ.get("RAY_ADDRESS")
    if alone:
        _start_here(ray, max(cpus, local_cpus()) + 1)
    elif ours:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()  # also makes ray.data's log handlers
    settings: dict[str, Any] = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "target_max_block_size": 1,  # every row is a block of its own, so that progress arrives when it is made
    }
    if alone:
        settings["wait_for_min_actors_s"] = 300  # all workers together, rather than the first one alone for a while
        quiet_ray_data()
    before = {name: getattr(context, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(context, name, value)
        yield ray
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        cloudpickle.unregister_pickle_by_value(jobs)
        if ours:
            ray.shutdown()


def _start_here(ray: Any, cpus: int) -> None:
    """Starts Ray on this machine, with its GPUs where it has any.

    With one logical CPU more than there are, so that a plan whose actors use all of them can still start its tasks.
    """
    # Ray's C++ side greets every actor pool with an error line about restarts (ray-project/ray#53727), and a change of
    # its log level with a line of its own
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_worker_niceness", "0")  # its workers are the job itself, and would be at 15
    # `keep_freed_memory`, for the arenas too that threads have made before it is called: Ray Train trains in a thread
    for name, value in (("ARENA_MAX", 1), ("TRIM_THRESHOLD_", 1 << 30), ("MMAP_THRESHOLD_", 32 << 20)):
        os.environ.setdefault(f"MALLOC_{name}", str(value))
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
