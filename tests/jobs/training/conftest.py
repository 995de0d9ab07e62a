"""Fixtures of the training feed."""

import pytest
from feeds import folder_of, table_of

import alit.training.data
import jobs.training.feed


@pytest.fixture(params=["files", "Parquet"])
def write(request, monkeypatch):
    """Writes images as files or as Parquet, of whose rows 4 stay together."""
    monkeypatch.setattr(jobs.training.feed, "SLICE", 4)
    return folder_of if request.param == "files" else table_of


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 12 images, so that small inputs have several."""
    monkeypatch.setattr(alit.training.data, "CHUNK", 12)
