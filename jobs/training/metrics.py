"""Prometheus metrics of a training run."""

from __future__ import annotations

import time
from typing import Any


class TrainMetrics:
    """Of a training run, from the events of its `RunFolder`, in the worker that tells them.

    Args:
        run: the run folder's path.
    """

    def __init__(self, run: str) -> None:
        from ray.util import metrics

        names = {
            "step": ("alit_train_step", "Steps trained."),
            "loss": ("alit_train_loss", "Mean of the last steps."),
            "images_per_second": ("alit_train_images_per_second", "Of all workers together."),
            "waiting": ("alit_train_waiting_ratio", "Share of the time that workers wait for data."),
            "mfu": ("alit_train_mfu_ratio", "Floating-point operations over the GPUs' peak."),
        }
        self.gauges = {key: metrics.Gauge(name, about, ("run",)) for key, (name, about) in names.items()}
        self.saved = metrics.Gauge(
            "alit_train_checkpoint_timestamp_seconds", "Unix time since which work would be lost.", ("run",)
        )
        for gauge in (*self.gauges.values(), self.saved):
            gauge.set_default_tags({"run": run})
        self.saved.set(time.time())  # a worker begins at a checkpoint, or at nothing

    def tell(self, event: dict[str, Any]) -> None:
        """Takes one event."""
        for key, value in event.get("row", {}).items():
            if key in self.gauges:
                self.gauges[key].set(value)
        if "saved" in event:
            self.saved.set(time.time())
