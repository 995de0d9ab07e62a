"""Pixels as tensors."""

import numpy as np
import torch

from alit.images.tensors import to_tensor


def test_to_tensor_moves_the_colour_axis_without_a_copy() -> None:
    """The tensor has the colours first and shares the array's memory."""
    pixels = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    tensor = to_tensor(pixels)
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (2, 3, 4, 5)
    assert tensor[1, 2, 3, 4] == pixels[1, 3, 4, 2]
    pixels[0, 0, 0, 0] = 77
    assert tensor[0, 0, 0, 0] == 77
