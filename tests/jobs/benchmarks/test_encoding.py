"""The encode benchmark."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from alit.encoding.criteria import parse
from alit.errors import AlitError
from alit.weights import load_weights
from jobs.benchmarks.encoding import benchmark_encode, time_encode
from jobs.benchmarks.options import EncodeBenchmarkOptions


def test_time_encode_measures_lengths_and_tokens(small_weights):
    """The encode benchmark times every fixed length and the criterion, with the model's mean tokens."""
    model = load_weights(small_weights).model
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    criterion = parse("l1:0.4")
    times = time_encode(model, images, criterion, rounds=2)
    assert set(times.fixed) == {4, 8, 12}
    assert times.mean_tokens == pytest.approx(model.encode(images, criterion).num_tokens.double().mean().item())
    assert 0 < times.implied <= times.every * 1.5
    assert times.ratio > 0


def test_benchmark_encode_refuses_a_fixed_length(image_folder, small_weights):
    """The encode benchmark refuses a criterion of a fixed length."""
    options = EncodeBenchmarkOptions(criterion="fixed:4", weights=str(small_weights), batch_size=4, rounds=1)
    with pytest.raises(AlitError, match="adaptive"):
        benchmark_encode(str(image_folder), options, Console(quiet=True))
