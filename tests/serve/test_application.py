"""The application for `serve build`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml
from ray.serve.schema import ServeDeploySchema


def test_application_can_be_built_by_serve(tmp_path: Path) -> None:
    """The command `serve build` writes the default application."""
    command = [str(Path(sys.executable).with_name("serve")), "build", "serve.application:application"]
    subprocess.run([*command, "-o", str(tmp_path / "built.yaml")], cwd=tmp_path, check=True, capture_output=True)
    found = yaml.safe_load((tmp_path / "built.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(found).applications
    assert application.import_path == "serve.application:application"
    assert [deployment.name for deployment in application.deployments] == ["Encoder", "Ingress"]
