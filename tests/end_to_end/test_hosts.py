"""A job on several hosts, one of which is cut off while it runs: the short form of `make hosts`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hosts import Hosts, allowed, prepare, tokenize

from alit.images.encode import encode_image


@pytest.mark.slow
def test_tokenize_survives_the_loss_of_a_host(capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenize job on several hosts finishes with every image after one host loses its network."""
    if reason := allowed():
        pytest.skip(reason)
    random = np.random.default_rng(0)
    files = [encode_image(random.integers(0, 256, (48, 64, 3), np.uint8)) for _ in range(192)]
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder, Hosts(Path(folder)) as hosts:
        prepare(hosts, files, redis=False)
        tokenize(hosts, len(files), cut=True, criterion="fixed:64", wait=False)
    said = capsys.readouterr().out
    assert '"what": "a worker host was cut off"' in said
    assert '"what": "tokenized and verified", "images": 192' in said
