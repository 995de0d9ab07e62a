"""Prometheus metrics of a training run."""

from __future__ import annotations

import time

from jobs.training.events import CheckpointSaved, Event, StepLog, ValidationLog


class TrainMetrics:
    """Gauges of a training run, set from the events of its `RunFolder` in the worker that reports them.

    Args:
        run: Path of the run folder.
    """

    def __init__(self, run: str) -> None:
        from ray.util import metrics

        descriptions = {
            "step": ("alit_train_step", "Steps trained."),
            "loss": ("alit_train_loss", "Mean of the last steps."),
            "images_per_second": ("alit_train_images_per_second", "Of all workers together."),
            "waiting": ("alit_train_waiting_ratio", "Share of the time that workers wait for data."),
            "mfu": ("alit_train_mfu_ratio", "Floating-point operations over the GPUs' peak."),
        }
        self.gauges = {key: metrics.Gauge(name, text, ("run",)) for key, (name, text) in descriptions.items()}
        self.saved = metrics.Gauge(
            "alit_train_checkpoint_timestamp_seconds", "Unix time since which work would be lost.", ("run",)
        )
        for gauge in (*self.gauges.values(), self.saved):
            gauge.set_default_tags({"run": run})
        self.saved.set(time.time())  # a worker starts from a checkpoint, or from step 0

    def on_event(self, event: Event) -> None:
        """Updates the gauges from one event."""
        if isinstance(event, StepLog | ValidationLog):
            for name, value in event.row().items():
                if name in self.gauges:
                    self.gauges[name].set(value)
        elif isinstance(event, CheckpointSaved):
            self.saved.set(time.time())
