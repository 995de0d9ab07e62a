"""What runs on the workers of a training run, and what starts them: Ray Train, or this process alone.

A worker makes its trainer of a `TrainSpec`, goes on from the run's newest checkpoint and trains. Nothing that it needs lies
on the driver's disk.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alit.metrics.lpips import Perceptual
from alit.tokenizer import Alit
from alit.training import distributed
from alit.training.loop import train
from alit.training.objectives import objective_for
from alit.training.trainer import Trainer, TrainingBatch
from jobs.runtime.process import keep_freed_memory
from jobs.storage.path import StoragePath
from jobs.training.feed import Feed
from jobs.training.local_feed import local_batches
from jobs.training.run_folder import RunFolder, RunSettings, Tell


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """All that a worker needs; picklable.

    Attributes:
        settings: what was asked for.
        folder: of the run.
        model: with its initial values, on the CPU.
        perceptual: LPIPS, where its files were given.
        feed: the training images.
        validation_images: the validation images, uint8 [B, 3, S, S].
        flops: floating-point operations per image.
        threads: of torch, per worker.
    """

    settings: RunSettings
    folder: StoragePath
    model: Alit
    perceptual: Perceptual | None
    feed: Feed
    validation_images: Tensor | None
    flops: float
    threads: int


def train_worker(
    start: TrainSpec,
    batches: Callable[[int, int], Iterator[TrainingBatch]],
    *,
    device: torch.device,
    tell: Tell,
    preempted: Callable[[], bool] = lambda: False,
) -> None:
    """What every worker does: `batches` gives its share of the steps from one to another."""
    torch.set_num_threads(start.threads)
    keep_freed_memory()
    recipe = start.settings.recipe
    model = start.model.to(device).train()
    perceptual = start.perceptual.to(device) if start.perceptual is not None else None
    trainer = Trainer(model, objective_for(model, recipe, perceptual), recipe)
    run = RunFolder(
        start.folder,
        start.settings,
        validation_images=start.validation_images,
        flops=start.flops,
        tell=tell,
        preempted=preempted,
    )
    places = distributed.gathered_objects(f"process {os.getpid()} on {socket.gethostname()}")
    if distributed.rank() == 0:
        tell({"line": f"training on {device.type} with {len(places)} worker(s): {', '.join(places)}"})
    run.resume(trainer)
    train(trainer, run.without_rejects(batches(trainer.step, recipe.steps)), run)
    run.finish(trainer)


def train_locally(start: TrainSpec, *, tell: Tell) -> None:
    """Trains in this process, without Ray."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_worker(start, lambda first, last: local_batches(start.feed, first, last), device=device, tell=tell)
