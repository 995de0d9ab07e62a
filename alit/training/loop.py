"""The training loop: steps, logging, validation and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from alit.errors import TrainingError
from alit.training.trainer import Trainer, TrainingBatch


@runtime_checkable
class Run(Protocol):
    """What the loop tells the world: lines and pictures, validations, checkpoints. Every worker calls all of it."""

    def log(self, trainer: Trainer, recent: Sequence[dict[str, Tensor]], seconds: float, waited: float) -> None:
        """The numbers of the steps since the last time, of whose `seconds` `waited` went by waiting for data."""
        ...

    def validate(self, trainer: Trainer) -> float | None:
        """Looks at the averaged model. A score, lower being better."""
        ...

    def checkpoint(self, trainer: Trainer, score: float | None) -> None:
        """Keeps the state."""
        ...


def train(trainer: Trainer, batches: Iterable[TrainingBatch], run: Run) -> None:
    """Trains from the trainer's step to the end of its recipe on the batches of these steps."""
    recipe, feed = trainer.recipe, iter(batches)

    def due(every: int) -> bool:
        return trainer.step % every == 0 or trainer.step == recipe.steps

    recent: list[dict[str, Tensor]] = []
    started, waited = time.monotonic(), 0.0
    while trainer.step < recipe.steps:
        asked = time.monotonic()
        batch = next(feed, None)
        if batch is None:
            raise TrainingError(f"the data ended at step {trainer.step} of {recipe.steps}")
        waited += time.monotonic() - asked
        recent.append(trainer.train_step(batch))
        if logged := due(recipe.log_every):
            run.log(trainer, recent, time.monotonic() - started, waited)
        score = run.validate(trainer) if due(recipe.validate_every) else None
        if due(recipe.checkpoint_every):
            run.checkpoint(trainer, score)
        if logged:
            recent, started, waited = [], time.monotonic(), 0.0


def endless(images: Tensor, ids: Sequence[str] = ()) -> Iterator[TrainingBatch]:
    """The same batch again and again."""
    while True:
        yield TrainingBatch(images, ids)
