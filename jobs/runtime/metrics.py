"""Prometheus metrics through Ray's API."""

from __future__ import annotations

from typing import Any


def add_positive(counter: Any, value: float) -> None:
    if value > 0:  # Ray refuses 0
        counter.inc(value)
