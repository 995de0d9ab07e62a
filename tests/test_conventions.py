"""Rules that all tests follow: names, docstrings, and one test file per module."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from paths import ROOT, TESTS

FILES = sorted(TESTS.rglob("test_*.py"))
PACKAGES = ("alit", "jobs", "serve")
LONGEST_NAME = 60
WITHOUT_MODULE = {
    "alit/test_golden.py": "numbers of published models, through several modules",
    "serve/test_playground.py": "a folder of HTML and JavaScript",
    "serve/test_survival.py": "the whole service while its processes die",
}
"""Test files that test no single module, and what they test instead."""


def relative(path: Path) -> str:
    return path.relative_to(TESTS).as_posix()


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_functions_have_short_names_and_docstrings(file: Path) -> None:
    """Every test function has a plain name of at most 60 characters, and its docstring is one or more sentences."""
    tree = ast.parse(file.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    tests = [node for node in functions if node.name.startswith("test")]
    assert tests, "a test file without tests"
    assert [node.name for node in tests if not re.fullmatch(r"test_[a-z0-9_]+", node.name)] == []
    assert [node.name for node in tests if len(node.name) > LONGEST_NAME] == []
    docstrings = {node.name: ast.get_docstring(node) or "" for node in tests}
    assert [name for name, text in docstrings.items() if not re.match(r"[A-Z0-9`].*\.$", text, re.DOTALL)] == []


@pytest.mark.parametrize("file", [file for file in FILES if relative(file).startswith(PACKAGES)], ids=relative)
def test_file_has_the_path_of_a_module(file: Path) -> None:
    """A test file of a package lies where its module lies, under the module's name."""
    if relative(file) not in WITHOUT_MODULE:
        module = file.with_name(file.name.removeprefix("test_"))
        assert (ROOT / module.relative_to(TESTS)).is_file()


def test_exceptions_of_the_module_rule_exist() -> None:
    """Every exception of the rule names an existing test file that has no module."""
    for name in WITHOUT_MODULE:
        path = TESTS / name
        assert path in FILES
        assert not (ROOT / path.with_name(path.name.removeprefix("test_")).relative_to(TESTS)).exists()
