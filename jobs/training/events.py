"""Events of a training run, which its workers report to the driver; picklable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """A line of text for the user."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """What the run does between training steps, such as `validating`."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved:
    """A checkpoint is complete.

    Attributes:
        step: Number of steps trained.
    """

    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLog:
    """Measurements of the training steps since the previous log line, over all workers.

    Attributes:
        step: Number of steps trained.
        total_steps: Number of steps of the whole run.
        scalars: Means of the steps' scalars by name, `loss` among them.
        images_per_second: Throughput of all workers together.
        waiting: Share of the time that is spent waiting for data, from 0 to 1.
        learning_rate: Learning rate of the model's optimizer.
        mfu: Model FLOPs utilization, from 0 to 1; None where the peak of the device is unknown.
    """

    step: int
    total_steps: int
    scalars: Mapping[str, float]
    images_per_second: float
    waiting: float
    learning_rate: float
    mfu: float | None

    def row(self) -> dict[str, Any]:
        """Returns the fields of the line in the run's log."""
        row = {"step": self.step, **self.scalars, "images_per_second": self.images_per_second}
        row |= {"waiting": self.waiting, "learning_rate": self.learning_rate}
        return _rounded(row if self.mfu is None else row | {"mfu": self.mfu})


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationLog:
    """Results of a validation.

    Attributes:
        step: Number of steps trained.
        total_steps: Number of steps of the whole run.
        scalars: Distances and the perplexity of the codebook by name, such as `val_l1_256`.
        chosen_lengths: Number of images for which the criterion chooses each length; None for the base stage.
    """

    step: int
    total_steps: int
    scalars: Mapping[str, float]
    chosen_lengths: list[int] | None

    def row(self) -> dict[str, Any]:
        """Returns the fields of the line in the run's log."""
        row: dict[str, Any] = {"step": self.step, **self.scalars}
        return _rounded(row if self.chosen_lengths is None else row | {"chosen_lengths": self.chosen_lengths})


Event = Message | Activity | CheckpointSaved | StepLog | ValidationLog
OnEvent = Callable[[Event], None]


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
