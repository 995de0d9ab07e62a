"""Fixtures of the library's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lively_models import Work
from torch import Tensor

from alit.tokenizer import Alit


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[[Alit], Work]:
    """Returns a function that starts to count the rows that each part of a model is called with."""

    def watch(model: Alit) -> Work:
        work = Work([], [], [])

        def counted(function: Callable[[Tensor], Tensor], calls: list[int]) -> Callable[[Tensor], Tensor]:
            return lambda x: (calls.append(len(x)), function(x))[1]

        monkeypatch.setattr(model.encoder, "iterate", counted(model.encoder.iterate, work.encoder))
        monkeypatch.setattr(model.decoder, "forward", counted(model.decoder.forward, work.latent_decoder))
        monkeypatch.setattr(model.base, "decode", counted(model.base.decode, work.pixel_decoder))
        return work

    return watch
