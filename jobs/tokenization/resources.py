"""Worker counts, batch sizes and the resources of one worker."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch

from alit.training.cost import inference_bytes
from alit.weights import Weights
from jobs.runtime.placement import await_room, labels
from jobs.runtime.process import local_cpus
from jobs.tokenization.options import TokenizeOptions

CPUS_BESIDE_GPU = 0.5


def batch_size(options: TokenizeOptions, before: dict[str, Any] | None, loaded: Weights) -> int:
    """The batch size that is asked for; of `auto` the one that a job was begun with, or one that fits the GPU."""
    if options.batch_size != "auto":
        return options.batch_size
    if before is not None:
        return int(before["batch_size"])
    if not torch.cuda.is_available():
        return 64
    room = torch.cuda.mem_get_info()[1] // 4
    return max(1, min(512, 1 << (room // inference_bytes(loaded.model.config)).bit_length() - 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """The processes that hold the model, and where they run.

    Attributes:
        count: how many.
        gpus: of each.
        memory: bytes of heap that each is given room for; 0 for no such promise.
        labels: of the nodes they run on.
        decoders: tasks that decode for each of them.
        decode_labels: of the nodes that those run on.
    """

    count: int
    gpus: float = 0.0
    memory: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    decoders: int = 0
    decode_labels: dict[str, str] = field(default_factory=dict)

    @property
    def needs(self) -> dict[str, float]:
        """Of one of them, as Ray counts."""
        found = {"CPU": CPUS_BESIDE_GPU if self.gpus else 1.0, "GPU": self.gpus, "memory": self.memory}
        return {name: amount for name, amount in found.items() if amount}


def workers_for(options: TokenizeOptions, there: dict[str, float], shards: int) -> Workers:
    """As asked for, or as there is room for."""
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = float(there.get("GPU", 0) > 0)
    cpus = int(there.get("CPU", 1)) if os.environ.get("RAY_ADDRESS") else local_cpus()
    count = options.workers or max(1, int(there.get("GPU", 0) / gpus) if gpus else cpus)
    decoders = options.decode_workers
    if decoders is None:
        decoders = max(0, int((cpus - CPUS_BESIDE_GPU * count) // count)) if gpus else 0
    return Workers(
        count=min(count, shards),
        gpus=gpus,
        memory=int(options.worker_memory * 2**30),
        labels=labels("--worker-labels", options.worker_labels),
        decoders=decoders,
        decode_labels=labels("--decode-labels", options.decode_labels),
    )


def room_for(workers: Workers, patience: float) -> None:
    """Waits until the cluster has room for one of them, and beside it for a task that decodes."""
    wanted = [(workers.needs, workers.labels)]
    if workers.decoders:
        wanted.append(({"CPU": 1.0}, workers.decode_labels))
    await_room(wanted, patience)
