"""The package: the contents of a wheel, the installed command, and which package imports which."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

PACKAGES = ("alit", "jobs", "serve")


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that neither is the checkout littered nor does an old build folder leak into the wheel."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)
    assert built.returncode == 0, built.stdout
    return next(out.glob("alit-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel unpacked by pip; its dependencies are those of the running environment."""
    target = tmp_path_factory.mktemp("installed")
    pip = run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    assert pip.returncode == 0, pip.stdout
    return target


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's folder that happens to have packages named as ours."""
    for package in ("jobs", "serve"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('imported from the working directory')\n")
    return tmp_path


def test_wheel_holds_exactly_the_packages(wheel: Path) -> None:
    """A wheel holds every file of the packages and the license, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    assert held == {path.relative_to(ROOT).as_posix() for path in files if path.parent.name != "__pycache__"}
    assert len(licenses) == 1


def test_command_ignores_packages_of_the_working_folder(installed: Path, elsewhere: Path) -> None:
    """The installed command works in a folder that holds other packages named jobs and serve."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    where = run(sys.executable, "-P", "-c", "import jobs; print(jobs.__file__)", cwd=elsewhere, env=environment)
    assert where.stdout.strip() == str(installed / "jobs" / "__init__.py")
    shown = run(sys.executable, installed / "bin" / "alit", "--help", cwd=elsewhere, env=environment)
    assert shown.returncode == 0, shown.stdout
    assert "usage: alit" in shown.stdout


def test_import_of_alit_loads_no_engine() -> None:
    """Importing alit loads neither Ray nor network libraries nor the packages that use it."""
    unwanted = {"ray", "fsspec", "s3fs", "fastapi", "diffusers", "jobs", "serve"}
    code = f"import sys, alit; print(sorted({unwanted!r} & sys.modules.keys()))"
    assert run(sys.executable, "-c", code, cwd=ROOT).stdout.strip() == "[]"


def test_imports_keep_their_contracts() -> None:
    """The import contracts of pyproject.toml are kept."""
    lint_imports = Path(sysconfig.get_path("scripts")) / "lint-imports"
    linted = run(sys.executable, lint_imports, "--no-cache", cwd=ROOT)
    assert linted.returncode == 0, linted.stdout
