"""The loop trains to the last step, calling its callbacks at the recipe's intervals."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest
from small_trainers import batches, common, trainer_of
from torch import Tensor

from alit.errors import TrainingError
from alit.training.loop import train
from alit.training.recipes import BaseRecipe
from alit.training.trainer import Trainer


class Recorder:
    """Callbacks that record their calls."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, int]] = []
        self.validated: list[int] = []
        self.saved: list[tuple[int, float | None]] = []

    def log(self, trainer: Trainer, recent: Sequence[dict[str, Tensor]], seconds: float, waited: float) -> None:
        assert 0 <= waited <= seconds
        self.logged.append((trainer.step, len(recent)))

    def validate(self, trainer: Trainer) -> float | None:
        self.validated.append(trainer.step)
        return trainer.step / 10

    def checkpoint(self, trainer: Trainer, score: float | None) -> None:
        self.saved.append((trainer.step, score))


def test_train_calls_back_at_intervals():
    """Callbacks are called at the recipe's intervals and after the last step, checkpoints with their step's score."""
    trainer, calls = trainer_of(BaseRecipe(**common(log_every=2, validate_every=3, checkpoint_every=4))), Recorder()
    train(trainer, batches(0), calls)
    assert calls.logged == [(2, 2), (4, 2), (6, 2)]
    assert calls.validated == [3, 6]
    assert calls.saved == [(4, None), (6, 0.6)]


def test_train_refuses_data_that_ends_too_early():
    """Batches that end before the last step raise an error with both steps."""
    trainer = trainer_of(BaseRecipe(**common()))
    with pytest.raises(TrainingError, match="the data ended at step 2 of 6"):
        train(trainer, islice(batches(0), 2), Recorder())
    assert trainer.step == 2
