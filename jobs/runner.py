"""Ray for a job: started or joined, quiet, with our code on every worker."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from alit.errors import AlitError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def local_cpus() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Lets this process reuse freed memory instead of returning it, where the C library is glibc.

    Activations of megabytes come and go with every layer; returned to the kernel and zeroed anew each time they cost a
    tenth of the encoding on CPUs.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, value in ((M_ARENA_MAX, 1), (M_TRIM_THRESHOLD, 1 << 30), (M_MMAP_THRESHOLD, 32 << 20)):
        mallopt(option, value)


def quiet_ray_data() -> None:
    """Keeps Ray Data's errors from the console of this process: they reach us as exceptions, and its log file has them.

    Its handlers are made with the first `DataContext`.
    """
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)


class Stopped(SystemExit):
    """SIGTERM came: the machine wants to be free."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Raises `Stopped` when this process is asked to end, so that what is open is closed and Ray is shut down."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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


def await_room(wanted: Sequence[tuple[Mapping[str, float], Mapping[str, str]]], patience: float) -> None:
    """Waits until a cluster that was joined has room for all of it at once, which makes an autoscaler bring nodes.

    Args:
        wanted: bundles of resources, as Ray counts them, each with the labels of the node on which it lies.
        patience: in seconds.

    Raises:
        AlitError: there is still no room.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    if not os.environ.get("RAY_ADDRESS"):
        return
    bundles = [dict(bundle) for bundle, _ in wanted]
    labels = [dict(labels) for _, labels in wanted]
    selectors: Any = labels if any(labels) else None
    group = placement_group(bundles, bundle_label_selector=selectors)
    try:
        if group.wait(2):
            return
        words = [
            "(" + ", ".join(f"{amount:g} {name}" for name, amount in bundle.items()) + ")"
            + "".join(f" on {key}={value}" for key, value in where.items())
            for bundle, where in wanted
        ]  # fmt: skip
        asked = " and ".join(f"{words.count(each)} x {each}" for each in dict.fromkeys(words))
        print(f"waiting up to {patience:g} s for the cluster to have room for {asked}", file=sys.stderr)
        if not group.wait(patience):
            there = ray.cluster_resources()
            names = dict.fromkeys(name for bundle in bundles for name in bundle)
            has = ", ".join(f"{there.get(name, 0):g} {name}" for name in names)
            raise AlitError(
                f"the cluster has no room for {asked} after {patience:g} s; its nodes have {has} together, in use or "
                "not. Ask for less, add nodes, or wait longer with --patience"
            )
    finally:
        remove_placement_group(group)


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
