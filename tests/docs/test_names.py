"""The modules, classes and functions that the documentation names exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("CONTRIBUTING.md")])
NAME = re.compile(r"`((?:alit|jobs|serve)(?:\.(?!ya?ml|json|toml|py`)\w+)+)(?:\([^`]*\))?`")
FILE = re.compile(r"`((?:alit|jobs|serve|tests|cluster|docs)/[\w./-]+\.\w+)`")


def resolve(name: str) -> Any:
    """Returns the module, class or function of a dotted name.

    Raises:
        AttributeError: There is none.
    """
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            fields = getattr(found, "__dataclass_fields__", {}) | getattr(found, "model_fields", {})
            found = fields[part] if part in fields else getattr(found, part)
        return found
    raise AttributeError(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_names_exist(page: Path) -> None:
    """Every dotted name and every file that a page names exists."""
    text = page.read_text()
    missing = [name for name in sorted(set(NAME.findall(text))) if not exists(name)]
    missing += [name for name in sorted(set(FILE.findall(text))) if not (ROOT / name).exists()]
    assert not missing


def exists(name: str) -> bool:
    try:
        resolve(name)
    except AttributeError:
        return False
    return True
