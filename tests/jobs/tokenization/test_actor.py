"""The job's actors in Ray Data."""

from __future__ import annotations

import pickle
from typing import Any

from small_models import SMALL

from jobs.runtime.resources import Workers
from jobs.sources.records import Source
from jobs.storage.path import parse_uri
from jobs.tokenization.actor import tokenize_shards
from jobs.tokenization.description import TokenizeJob


def test_tokenize_shards_accepts_workers_with_gpus(ray_session: str) -> None:
    """Ray Data accepts the resource options of workers with GPUs, some of which it refuses; nothing is run."""
    unused: Any = None
    folder = parse_uri("/nowhere")
    with_gpus = Workers(count=2, gpus=0.5, memory=1 << 30, labels={"tier": "gpu"}, decoders=1)
    job = TokenizeJob(
        source=Source(root=folder),
        output=folder,
        config=SMALL,
        fingerprint="abc",
        criterion="l1:0.1",
        workers=with_gpus,
    )
    assert pickle.loads(pickle.dumps(job)) == job
    assert tokenize_shards(job, unused, unused, range(5)) is not None
