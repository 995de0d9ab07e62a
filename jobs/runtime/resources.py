"""Worker counts, batch size and Ray resource requirements: the one rule of tokenization and evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from alit.model.config import AlitConfig
from alit.training.cost import inference_bytes
from jobs.runtime.placement import wait_for_resources
from jobs.runtime.process import local_cpus
from jobs.runtime.session import ray_session

CPUS_BESIDE_GPU = 0.5
"""CPUs that a worker with a GPU reserves for itself."""

CPU_BATCH_SIZE = 64
MAX_BATCH_SIZE = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """The CPUs and GPUs that workers can be placed on, in use or not."""

    cpus: int
    gpus: float = 0.0


def joins_cluster() -> bool:
    """Returns whether `RAY_ADDRESS` names a cluster for jobs to join, rather than starting Ray on this machine."""
    return bool(os.environ.get("RAY_ADDRESS"))


def session_resources(ray: Any) -> Resources:
    """Returns the resources of a running Ray session: the cluster's, or this machine's where Ray was started locally.

    Locally the CPUs are counted by the operating system, since Ray is started there with one more than exist.
    """
    totals = ray.cluster_resources()
    cpus = int(totals.get("CPU", 1)) if joins_cluster() else local_cpus()
    return Resources(cpus=cpus, gpus=totals.get("GPU", 0.0))


def existing_resources() -> Resources:
    """Returns the resources that a job started from this process would find.

    Joins the cluster that `RAY_ADDRESS` names, if any; otherwise inspects this machine without starting Ray.
    """
    if joins_cluster():
        with ray_session() as ray:
            return session_resources(ray)
    return Resources(cpus=local_cpus(), gpus=float(torch.cuda.device_count()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """The processes that hold the model, and where they run.

    Attributes:
        count: Number of workers.
        gpus: GPUs per worker; a fraction where workers share a GPU.
        memory: Bytes of heap reserved per worker; 0 for no reservation.
        labels: Label selector of the nodes that workers run on.
        decoders: Decode tasks per worker; 0 where workers decode for themselves.
        decode_labels: Label selector of the nodes that decode tasks run on.
    """

    count: int = 1
    gpus: float = 0.0
    memory: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    decoders: int = 0
    decode_labels: dict[str, str] = field(default_factory=dict)

    @property
    def requirements(self) -> dict[str, float]:
        """Ray resource requirements of one worker."""
        amounts = {"CPU": CPUS_BESIDE_GPU if self.gpus else 1.0, "GPU": self.gpus, "memory": self.memory}
        return {name: amount for name, amount in amounts.items() if amount}


def resolve_workers(
    resources: Resources,
    *,
    tasks: int,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    decode_workers: int | None = None,
    memory_gib: float = 0.0,
    labels: Mapping[str, str] | None = None,
    decode_labels: Mapping[str, str] | None = None,
) -> Workers:
    """Resolves worker counts from what was requested and from the resources that exist.

    Args:
        resources: The resources of the cluster or machine.
        tasks: Number of units of work; more workers than that are never started.
        workers: Requested number; None for as many as the GPUs hold, or one per CPU where workers use no GPU.
        gpus_per_worker: Requested share; None for one GPU each where there are any.
        decode_workers: Requested decode tasks per worker; None for the CPUs that GPU workers leave free, or 0 on CPUs.
        memory_gib: GiB of heap to reserve per worker.
        labels: Label selector of the workers' nodes.
        decode_labels: Label selector of the decode tasks' nodes.
    """
    gpus = gpus_per_worker
    if gpus is None:
        gpus = float(resources.gpus > 0)
    count = workers or max(1, int(resources.gpus / gpus) if gpus else resources.cpus)
    decoders = decode_workers
    if decoders is None:
        decoders = max(0, int((resources.cpus - CPUS_BESIDE_GPU * count) // count)) if gpus else 0
    return Workers(
        count=min(count, tasks),
        gpus=gpus,
        memory=int(memory_gib * 2**30),
        labels=dict(labels or {}),
        decoders=decoders,
        decode_labels=dict(decode_labels or {}),
    )


def wait_for_workers(workers: Workers, patience: float) -> None:
    """Waits until the cluster has room for one worker and, where it has decode tasks, for one of those too.

    Args:
        workers: The workers that are about to start.
        patience: Timeout in seconds.

    Raises:
        AlitError: The cluster still has no room.
    """
    bundles = [(workers.requirements, workers.labels)]
    if workers.decoders:
        bundles.append(({"CPU": 1.0}, workers.decode_labels))
    wait_for_resources(bundles, patience)


def resolve_batch_size(requested: int | Literal["auto"], recorded: int | None, config: AlitConfig) -> int:
    """Resolves the number of images per forward pass.

    Args:
        requested: A number, or `auto` for the recorded one or else one that fits this machine's GPU.
        recorded: The batch size that an interrupted job was started with, if there is one.
        config: The model.
    """
    if requested != "auto":
        return requested
    if recorded is not None:
        return recorded
    if not torch.cuda.is_available():
        return CPU_BATCH_SIZE
    budget = torch.cuda.mem_get_info()[1] // 4
    return max(1, min(MAX_BATCH_SIZE, 1 << (budget // inference_bytes(config)).bit_length() - 1))
