"""The application that Ray Serve builds."""

from __future__ import annotations

import pytest
import yaml
from paths import CLUSTER
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from serve.app import build
from serve.settings import Settings


@pytest.mark.parametrize("size", ["cpu", "gpu", "multi-gpu"])
def test_app_builds_from_every_example_config(size: str) -> None:
    """Ray Serve and our settings accept the example configuration of every size."""
    found = yaml.safe_load((CLUSTER / f"serve-{size}.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(found).applications
    assert application.import_path == "serve.app:build"
    settings = Settings(**application.args)
    assert found["http_options"]["request_timeout_s"] > settings.deadline_seconds
    built = call_user_app_builder_with_args_if_necessary(build, application.args)
    assert built._bound_deployment.name == "Ingress"
