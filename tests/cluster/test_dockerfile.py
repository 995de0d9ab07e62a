"""The Dockerfile's steps, run without a container engine: the same commands in another folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from paths import ROOT

TEXT = (ROOT / "cluster" / "Dockerfile").read_text().replace("\\\n", " ")
STEPS = [line.split(maxsplit=1) for line in TEXT.splitlines() if line and not line.startswith("#")]


def ignored(path: str) -> bool:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return f"!{path}" not in lines


def test_dockerfile_copies_files_of_the_build_context() -> None:
    """Every file that the Dockerfile copies exists and is not excluded by .dockerignore."""
    copied = [name for kind, rest in STEPS if kind == "COPY" and "--from" not in rest for name in rest.split()[:-1]]
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert not ignored(name), name
    assert ignored("tests")
    assert ignored(".venv")


def test_dockerfile_sets_user_and_healthcheck() -> None:
    """The image runs as an unprivileged user and has a health check."""
    kinds = [kind for kind, _ in STEPS]
    last = {kind: rest for kind, rest in STEPS}
    assert last["USER"] == "1000"
    assert "--uid 1000" in TEXT
    assert kinds.count("FROM") == 2
    assert "HEALTHCHECK" in kinds


@pytest.mark.slow
def test_dockerfile_installs_a_working_command(tmp_path: Path) -> None:
    """The Dockerfile's installation steps give a working `alit` command with the pinned dependencies."""
    build, installed = tmp_path / "build", tmp_path / "opt" / "alit"
    build.mkdir()
    index = ""
    for kind, rest in STEPS[: [kind for kind, _ in STEPS].index("FROM", 3)]:
        if kind == "COPY":
            *names, where = rest.split()
            for name in names:
                source, target = ROOT / name, build / where
                if source.is_dir():
                    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
                else:
                    target.mkdir(exist_ok=True)
                    shutil.copy(source, target)
        elif kind == "RUN":
            command = rest.replace("/opt/alit", str(installed)).replace('--extra-index-url "$TORCH_INDEX"', index)
            ran = subprocess.run(["bash", "-ec", command], cwd=build, capture_output=True, text=True, check=False)
            assert ran.returncode == 0, ran.stderr[-2000:]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    list_ = subprocess.run([installed / "bin/pip", "freeze"], capture_output=True, text=True, check=True).stdout
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", list_, re.MULTILINE):
        assert version.split("+")[0] == pins.get(name, version).split("+")[0], name
    # the same entrypoint as the same user, who may read everything here: the interpreter lies in root's home
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PATH": f"{installed / 'bin'}:{os.environ['PATH']}", "HOME": str(home)}
    before: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(home, 1000)
        before = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "--no-new-privs"]
        before += ["--inh-caps", "-all,+dac_read_search", "--ambient-caps", "-all,+dac_read_search"]
        before += ["--bounding-set", "-all,+dac_read_search"]

    def run(*words: str) -> str:
        done = subprocess.run([*before, *words], cwd=home, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "tokenize" in run("alit", "--help")
    who = "import os; print(os.getuid(), os.access('/', os.W_OK))"
    assert os.geteuid() != 0 or run("python", "-c", who) == "1000 False\n"
    code = "import serve.app, jobs.tokenization.job, alit; print(alit.__file__, len(alit.load_weights().fingerprint))"
    assert str(installed) in run("python", "-c", code)
