"""The command line as a whole: help, and mistakes as one line."""

from __future__ import annotations

import pytest

from jobs import cli


def test_cli_every_command_has_help(capsys):
    """Every command and every training stage prints its usage and exits with code 0."""
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        assert "usage: alit " + name in capsys.readouterr().out
    for stage in ("base", "distill", "finetune"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", stage, "--help"])
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert f"usage: alit train {stage}" in said
        assert "--learning-rate" in said


def test_cli_reports_mistakes_with_one_line_and_code_2(tmp_path, capsys):
    """A user's mistake is one line on standard error and exit code 2, without a traceback."""
    for arguments in (
        ["tokenize", str(tmp_path / "missing"), str(tmp_path / "out")],
        ["convert", str(tmp_path / "missing.pth"), str(tmp_path / "out")],
        ["show", str(tmp_path), str(tmp_path), str(tmp_path / "page.html"), "--weights", str(tmp_path)],
        ["evaluate", str(tmp_path), "--weights", str(tmp_path)],
        ["train", "base", str(tmp_path), str(tmp_path / "run"), "--steps", "1", "--perceptual-weight", "0"],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2, arguments
        assert error.startswith("alit: "), error
        assert len(error.strip().splitlines()) == 1, error
        assert "Traceback" not in error
