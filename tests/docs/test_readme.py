"""The README's lines that read a dataset."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT, TESTS

README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
READERS = next(code for kind, code in FENCE.findall(README) if kind == "python" and "read_parquet" in code)
LINES = [line for line in READERS.splitlines() if "(" in line and not line.startswith("import")]
LONGEST = 130


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of twelve images called `tokens`."""
    folder = tmp_path_factory.mktemp("readers")
    shutil.copytree(TESTS / "fixtures" / "format1" / "finished", folder / "tokens")
    return folder


@pytest.mark.filterwarnings("ignore")  # the readers' own
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split(".")[0])
def test_readme_lines_read_the_dataset(
    line: str, folder: Path, ray_session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line of the README reads the token rows, and nothing else, of a dataset."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {}
    exec(READERS.splitlines()[0], names)
    if line.startswith("ray"):  # whose workers began in another working folder than this one
        line = line.replace('"tokens', f'"{folder}/tokens')
    table = eval(line.split("#")[0].strip(), names)
    if isinstance(table, dict):
        table = table["train"]
    count = table.count() if hasattr(table, "iter_batches") else len(table.fetchall() if "duckdb" in line else table)
    assert count == 12


def test_readme_names_five_readers() -> None:
    """The README shows pandas, DuckDB, polars, Hugging Face and Ray Data, and is short."""
    assert [line.split(".")[0] for line in LINES] == ["pandas", "duckdb", "polars", "datasets", "ray"]
    assert len(README.splitlines()) <= LONGEST
