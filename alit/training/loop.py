"""The training loop: steps, logging, validation and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from alit.errors import TrainingError
from alit.training.trainer import Trainer, TrainingBatch


@runtime_checkable
class TrainingCallbacks(Protocol):
    """Logging, validation and checkpoint hooks; every worker calls all of them."""

    def log(self, trainer: Trainer, recent: Sequence[dict[str, Tensor]], seconds: float, waited: float) -> None:
        """Logs the scalars of the steps since the last call.

        Args:
            trainer: The trainer, after the last of these steps.
            recent: The scalars of each step, of this worker.
            seconds: The duration of these steps.
            waited: The part of `seconds` that was spent waiting for data.
        """
        ...

    def validate(self, trainer: Trainer) -> float | None:
        """Validates the averaged model and returns a score, lower being better; None without validation data."""
        ...

    def checkpoint(self, trainer: Trainer, score: float | None) -> None:
        """Writes a checkpoint, with the score of this step's validation, if any."""
        ...


def train(trainer: Trainer, batches: Iterable[TrainingBatch], callbacks: TrainingCallbacks) -> None:
    """Trains from the trainer's current step to the last step of its recipe.

    Args:
        trainer: The state of the run.
        batches: The batches of these steps, in order.
        callbacks: Called at the recipe's intervals and after the last step.

    Raises:
        TrainingError: The batches end too early, or a loss is not finite.
    """
    recipe, feed = trainer.recipe, iter(batches)

    def due(every: int) -> bool:
        return trainer.step % every == 0 or trainer.step == recipe.steps

    recent: list[dict[str, Tensor]] = []
    started, waited = time.monotonic(), 0.0
    while trainer.step < recipe.steps:
        requested = time.monotonic()
        batch = next(feed, None)
        if batch is None:
            raise TrainingError(f"the data ended at step {trainer.step} of {recipe.steps}")
        waited += time.monotonic() - requested
        recent.append(trainer.train_step(batch))
        if logged := due(recipe.log_every):
            callbacks.log(trainer, recent, time.monotonic() - started, waited)
        score = callbacks.validate(trainer) if due(recipe.validate_every) else None
        if due(recipe.checkpoint_every):
            callbacks.checkpoint(trainer, score)
        if logged:
            recent, started, waited = [], time.monotonic(), 0.0
