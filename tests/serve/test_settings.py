"""The service's settings."""

from __future__ import annotations

import yaml
from paths import CLUSTER

from serve.settings import ListenAddress, Settings, read_settings


def test_settings_example_holds_every_default() -> None:
    """The example file holds every setting with its default."""
    example = CLUSTER / "serve.yaml"
    assert read_settings(example, {}) == (Settings(), ListenAddress())
    assert set(yaml.safe_load(example.read_text())) == set(Settings.model_fields) | set(ListenAddress.model_fields)
