"""The training loop of one worker, and training in this process without Ray.

A worker builds its trainer from a `TrainSpec`, resumes from the run's newest checkpoint and trains. It needs no file on
the driver's disk.
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
from jobs.training.events import Message, OnEvent
from jobs.training.feed import Feed
from jobs.training.local_feed import local_batches
from jobs.training.run_folder import RunFolder, RunSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """Everything that a worker needs; picklable.

    Attributes:
        settings: The resolved settings of the run.
        folder: The run folder.
        model: The model with its initial values, on the CPU.
        perceptual: LPIPS, if its files are given.
        feed: The training images.
        validation_images: The validation images, uint8 [B, 3, S, S]; None without validation.
        flops: Floating-point operations per image.
        threads: Number of torch threads per worker.
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
    spec: TrainSpec,
    batches: Callable[[int, int], Iterator[TrainingBatch]],
    *,
    device: torch.device,
    on_event: OnEvent,
    preempted: Callable[[], bool] = lambda: False,
) -> None:
    """Trains as one worker of a run, from the newest checkpoint to the exported weights.

    Args:
        spec: The run.
        batches: Returns this worker's share of the batches from one step to another.
        device: The device to train on.
        on_event: Receives the run's events.
        preempted: Returns whether this machine is about to be taken away.

    Raises:
        AlitError: The checkpoint or the data does not fit the run, or training fails.
    """
    torch.set_num_threads(spec.threads)
    keep_freed_memory()
    recipe = spec.settings.recipe
    model = spec.model.to(device).train()
    perceptual = spec.perceptual.to(device) if spec.perceptual is not None else None
    trainer = Trainer(model, objective_for(model, recipe, perceptual), recipe)
    run = RunFolder(
        spec.folder,
        spec.settings,
        validation_images=spec.validation_images,
        flops=spec.flops,
        on_event=on_event,
        preempted=preempted,
    )
    places = distributed.gathered_objects(f"process {os.getpid()} on {socket.gethostname()}")
    if distributed.rank() == 0:
        on_event(Message(text=f"training on {device.type} with {len(places)} worker(s): {', '.join(places)}"))
    run.resume(trainer)
    train(trainer, run.without_rejects(batches(trainer.step, recipe.steps)), run)
    run.finish(trainer)


def train_locally(spec: TrainSpec, *, on_event: OnEvent) -> None:
    """Trains in this process, without Ray.

    Args:
        spec: The run.
        on_event: Receives the run's events.

    Raises:
        AlitError: As of `train_worker`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_worker(spec, lambda first, last: local_batches(spec.feed, first, last), device=device, on_event=on_event)
