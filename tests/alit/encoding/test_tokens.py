"""Tokens that a model cannot decode are rejected."""

from __future__ import annotations

import pytest
import torch
from lively_models import model_of


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0] * 5, r"image 1: this model decodes 4, 8, 12, 16 tokens, got the shape \(5,\)"),
        ([], r"this model decodes 4, 8, 12, 16 tokens, got the shape \(0,\)"),
        ([0] * 20, r"got the shape \(20,\)"),
        ([[0] * 4], r"got the shape \(1, 4\)"),
        ([0, 1, 64, 2], "image 1: ids must lie from 0 to 63, got 0 to 64"),
        ([0, -1, 3, 2], "image 1: ids must lie from 0 to 63, got -1 to 3"),
        ([0.0, 1.5, 2.0, 3.0], r"image 1: ids must be whole numbers, got torch\.float32"),
    ],
)
@pytest.mark.unchecked
def test_decode_rejects_invalid_ids(row, expected):
    """`decode` rejects ids of the wrong shape, range or type with the index of the image."""
    with pytest.raises(ValueError, match=expected):
        model_of("quantized").decode([[0, 1, 2, 3], row])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 6), r"image 0: this model decodes 4, 8, 12, 16 tokens, got the shape \(5, 6\)"),
        ((4,), r"got the shape \(4,\)"),
        ((4, 5), "image 0: codes must be 6 wide, got 5"),
    ],
)
def test_decode_rejects_codes_of_wrong_shape(shape, expected):
    """`decode` rejects continuous codes of the wrong shape."""
    with pytest.raises(ValueError, match=expected):
        model_of("continuous").decode([torch.zeros(shape)])
