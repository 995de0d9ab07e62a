"""The command line as a whole: help, and mistakes as one line."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from jobs import cli

JOBS = Path(cli.__file__).parent


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


def test_cli_runs_by_path_without_an_installed_package(tmp_path):
    """`python jobs/cli.py --help` works from a checkout that is not installed, and finds this checkout's packages."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Uninstall:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "sys.meta_path.insert(0, Uninstall())\n"
    )
    finished = subprocess.run(
        [sys.executable, str(JOBS / "cli.py"), "--help"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert all(name in finished.stdout for name in cli.COMMANDS)


def test_cli_no_module_shadows_the_standard_library():
    """With jobs/ first on the path, as for a script in it, no import of the standard library finds a module of ours."""
    names = {path.stem for path in JOBS.iterdir()}
    assert not names & sys.stdlib_module_names


@pytest.mark.parametrize("prefix", [[], ["submit"], ["submit", "--address", "http://head:8265"], ["submit", "--"]])
def test_cli_accepts_the_former_name_of_estimate(prefix, capsys, monkeypatch):
    """`alit plan` still works, submitted or not, and says on standard error what it is called now."""
    seen = []
    monkeypatch.setattr("jobs.tokenization.capacity.Rates.read", lambda path: None)
    monkeypatch.setattr("jobs.tokenization.capacity.print_estimate", lambda *arguments: seen.append("estimate"))
    monkeypatch.setattr("jobs.submission.client.submit", lambda command, options: seen.append(command[0]) or 0)
    with suppress(SystemExit):
        cli.main([*prefix, "plan", "tokenize", "--rates", "rates.json", "--images", "10"])
    assert seen == ["estimate"]
    captured = capsys.readouterr()
    assert captured.err == "alit: `alit plan` is now called `alit estimate`\n"
    assert captured.out == ""
