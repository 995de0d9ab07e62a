"""The job's actors in Ray Data."""

from __future__ import annotations

from typing import Any

from jobs.tokenization.resources import Workers

from jobs.tokenization.actor import stages


def test_stages_accept_workers_with_gpus(ray_session: str) -> None:
    """Ray Data accepts the resource options of workers with GPUs, some of which it refuses; nothing is run."""
    unused: Any = None
    with_gpus = Workers(count=2, gpus=0.5, memory=1 << 30, labels={"tier": "gpu"}, decoders=1)
    assert stages(unused, unused, unused, range(5), with_gpus) is not None
