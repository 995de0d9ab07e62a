"""Inputs that the tests of several jobs read."""

from __future__ import annotations

from pathlib import Path

import pytest
from inputs import IMAGES


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image files, to which tests add what names or holds them."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "files").mkdir()
    for i, data in enumerate(IMAGES):
        (folder / "files" / f"{i}.jpg").write_bytes(data)
    return folder
