"""Worker counts from options and the cluster's resources."""

from __future__ import annotations

from typing import Any

import pytest
from jobs.tokenization.resources import Workers, workers_for

from jobs.runtime.process import local_cpus
from jobs.tokenization.options import TokenizeOptions


def test_workers_for_fills_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of workers and decoders follows from the options, the cluster's resources and the shards."""

    def found(there: dict[str, float], shards: int = 1000, **options: Any) -> Workers:
        return workers_for(TokenizeOptions(**options), there, shards)

    cluster = {"CPU": 64.0, "GPU": 8.0}
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    assert found(cluster) == Workers(count=8, decoders=7, gpus=1.0)
    assert found(cluster, gpus_per_worker=0.5) == Workers(count=16, decoders=3, gpus=0.5)
    assert found(cluster, workers=2, decode_workers=1) == Workers(count=2, decoders=1, gpus=1.0)
    assert found({"CPU": 64.0}) == Workers(count=64)
    assert found({"CPU": 64.0}, shards=3).count == 3
    placed = found(cluster, worker_memory=2, worker_labels=("tier=gpu",), decode_labels=("tier=cpu", "zone=!a"))
    assert placed.needs == {"CPU": 0.5, "GPU": 1.0, "memory": 2 << 30}
    assert (placed.labels, placed.decode_labels) == ({"tier": "gpu"}, {"tier": "cpu", "zone": "!a"})
    monkeypatch.delenv("RAY_ADDRESS")
    assert found({"CPU": 1000.0}) == Workers(count=local_cpus())
