"""Prometheus metrics through Ray's API."""

from __future__ import annotations

from typing import Any


def add_positive(counter: Any, value: float) -> None:
    """Adds a value to a counter of `ray.util.metrics`; Ray refuses to add 0."""
    if value > 0:
        counter.inc(value)
