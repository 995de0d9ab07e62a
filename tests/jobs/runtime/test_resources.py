"""The one rule for worker counts and batch sizes."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alit.errors import AlitError
from jobs.runtime.process import local_cpus
from jobs.runtime.resources import (
    CPU_BATCH_SIZE,
    Resources,
    Workers,
    existing_resources,
    resolve_batch_size,
    resolve_workers,
    session_resources,
)
from jobs.tokenization.description import resolve_job_workers
from jobs.tokenization.options import TokenizeOptions

CLUSTER = Resources(cpus=64, gpus=8.0)


def resolve(resources: Resources, tasks: int = 1000, **options: Any) -> Workers:
    return resolve_job_workers(TokenizeOptions(**options), resources, tasks)


def fake_ray(**totals: float) -> Any:
    return SimpleNamespace(cluster_resources=lambda: totals)


def test_workers_without_gpus_are_one_per_cpu() -> None:
    """Without GPUs every CPU holds a worker, which decodes for itself."""
    assert resolve(Resources(cpus=64)) == Workers(count=64)
    assert resolve(CLUSTER, gpus_per_worker=0) == Workers(count=64)


def test_workers_with_gpus_are_one_per_gpu() -> None:
    """Every GPU holds a worker, and the CPUs that are left decode for the workers."""
    assert resolve(CLUSTER) == Workers(count=8, gpus=1.0, decoders=7)
    assert resolve(CLUSTER, workers=2, decode_workers=1) == Workers(count=2, gpus=1.0, decoders=1)


@pytest.mark.parametrize(("share", "count", "decoders"), [(0.5, 16, 3), (0.25, 32, 1), (2.0, 4, 15)])
def test_workers_share_gpus(share: float, count: int, decoders: int) -> None:
    """The number of workers follows from the share of a GPU that each of them gets."""
    workers = resolve(CLUSTER, gpus_per_worker=share)
    assert workers == Workers(count=count, gpus=share, decoders=decoders)
    assert workers.requirements == {"CPU": 0.5, "GPU": share}


def test_workers_are_never_more_than_tasks() -> None:
    """A job with fewer shards than workers starts one worker per shard."""
    assert resolve(Resources(cpus=64), tasks=3).count == 3
    assert resolve(CLUSTER, tasks=3, workers=100).count == 3


def test_workers_carry_memory_and_labels() -> None:
    """Memory and labels become Ray's requirements of a worker and of a decode task."""
    placed = resolve(CLUSTER, worker_memory=2, worker_labels=("tier=gpu",), decode_labels=("tier=cpu", "zone=!a"))
    assert placed.requirements == {"CPU": 0.5, "GPU": 1.0, "memory": 2 << 30}
    assert (placed.labels, placed.decode_labels) == ({"tier": "gpu"}, {"tier": "cpu", "zone": "!a"})
    with pytest.raises(AlitError, match="--worker-labels takes labels such as tier=gpu, got 'gpu'"):
        resolve(CLUSTER, worker_labels=("gpu",))


def test_resources_of_a_cluster_are_those_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster Ray counts the CPUs; on this machine the operating system does, as Ray has one CPU too many."""
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    assert session_resources(fake_ray(CPU=64.0, GPU=8.0)) == CLUSTER
    monkeypatch.delenv("RAY_ADDRESS")
    assert session_resources(fake_ray(CPU=1000.0)) == Resources(cpus=local_cpus())


def test_dry_run_joins_the_cluster_that_jobs_would_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """With RAY_ADDRESS the resources of a dry run are the cluster's."""
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    monkeypatch.setattr("jobs.runtime.resources.ray_session", lambda: nullcontext(fake_ray(CPU=64.0, GPU=8.0)))
    assert existing_resources() == CLUSTER


@pytest.mark.parametrize("options", [{}, {"gpus_per_worker": 0.5}, {"workers": 3}, {"gpus_per_worker": 0}])
@pytest.mark.parametrize("gpus", [0, 2])
def test_dry_run_and_job_find_the_same_workers(
    monkeypatch: pytest.MonkeyPatch, gpus: int, options: dict[str, Any]
) -> None:
    """A dry run, which does not start Ray, counts the same workers as the job on this machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    ray = fake_ray(CPU=local_cpus() + 1.0, **({"GPU": float(gpus)} if gpus else {}))
    assert resolve(existing_resources(), **options) == resolve(session_resources(ray), **options)
    if gpus and options == {"gpus_per_worker": 0.5}:
        assert resolve(existing_resources(), **options).count == 2 * gpus


def test_evaluation_follows_the_same_rule() -> None:
    """Without options of its own, an evaluation gets the workers of a tokenize job with default options."""
    for resources in (CLUSTER, Resources(cpus=5)):
        assert resolve_workers(resources, tasks=1000) == resolve(resources)


def test_batch_size_is_requested_or_recorded_or_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number wins over the recorded batch size, and that one over the size that suits the hardware."""
    config: Any = None
    assert resolve_batch_size(7, 32, config) == 7
    assert resolve_batch_size("auto", 32, config) == 32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_batch_size("auto", None, config) == CPU_BATCH_SIZE
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 4 * 1000))
    monkeypatch.setattr("jobs.runtime.resources.inference_bytes", lambda config: 10)
    assert resolve_batch_size("auto", None, config) == 64, "the largest power of two within 1000 / 10 images"
