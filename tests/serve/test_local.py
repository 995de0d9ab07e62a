"""`alit serve` on one machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_serve_command_refuses_bad_settings(tmp_path: Path) -> None:
    """Bad settings end `alit serve` with one sentence and exit code 2."""
    (tmp_path / "short").write_text("me:short\n")
    (tmp_path / "typo.yaml").write_text("max_imgs: 3\n")
    (tmp_path / "range.yaml").write_text("deadline_seconds: -1\n")
    cases = {
        "without API keys the service only listens on this machine": ["--host", "0.0.0.0"],
        "must be written name:key": ["--keys-file", tmp_path / "short"],
        "max_imgs: Extra inputs are not permitted": ["--config", tmp_path / "typo.yaml"],
        "deadline_seconds: Input should be greater than 0": ["--config", tmp_path / "range.yaml"],
        "cannot be read as YAML": ["--config", tmp_path / "absent.yaml"],
        "no weights in": ["--weights", "x", tmp_path / "absent"],
    }
    running = {}
    for words, arguments in cases.items():
        command = [str(Path(sys.executable).with_name("alit")), "serve", *map(str, arguments)]
        running[words] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for words, process in running.items():
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2, said
        assert words in said, said
        assert said.startswith("alit: ")
        assert "Traceback" not in said
