"""Ray sessions of jobs: start or join Ray, silence its console output, and ship this code to every worker."""

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
    """Silences Ray Data's console errors in this process; they arrive as exceptions and stand in its log file.

    Takes effect only after the first `DataContext` exists, which creates the log handlers.
    """
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)


@contextmanager
def unwrapped(kind: type[AlitError] = AlitError) -> Iterator[None]:
    """Re-raises a worker's `AlitError` without the class and the traceback that Ray wraps around it.

    Args:
        kind: The type to raise where the error crossed a process boundary.

    Raises:
        AlitError: A worker raised one; its message is the first line of the original.
    """
    try:
        yield
    except AlitError as error:
        cause = getattr(error, "cause", error)
        raise (kind if cause is not error else type(error))(str(cause).splitlines()[0]) from None  # Ray adds lines


@contextmanager
def ray_session(cpus: int = 0) -> Iterator[Any]:
    """Yields Ray: the cluster that `RAY_ADDRESS` names, the session that is already connected, or a new local one.

    Args:
        cpus: Logical CPUs that the job's actors need; a local Ray is started with more than that.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own announced default; it warns otherwise
    import ray
    from ray import cloudpickle

    import jobs

    # Ray puts the driver's folder first on its workers' path, where `jobs` may resolve to the user's own package
    cloudpickle.register_pickle_by_value(jobs)
    ours = not ray.is_initialized()
    alone = ours and not os.environ.get("RAY_ADDRESS")
    if alone:
        _start_local(ray, max(cpus, local_cpus()) + 1)
    elif ours:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()  # also creates ray.data's log handlers
    settings: dict[str, Any] = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "target_max_block_size": 1,  # every row is a block of its own, so that progress arrives without delay
    }
    if alone:
        settings["wait_for_min_actors_s"] = 300  # start with all workers rather than with the first one alone
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


def _start_local(ray: Any, cpus: int) -> None:
    """Starts Ray on this machine, with its GPUs if it has any.

    Args:
        ray: The module.
        cpus: Logical CPUs; one more than the actors take, so that Ray Data can still start its own tasks beside them.
    """
    # Ray logs a spurious restart error for every actor pool (ray-project/ray#53727), and one more line when its log
    # level is changed; hence the level, and the redirection of stderr below
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers are the job itself; the default is 15
    # as `keep_freed_memory` does, but also for arenas created before it is called: Ray Train trains in a thread
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
