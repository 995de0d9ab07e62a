"""Decoded pixels as the tensors that models take.

Shapes: B batch, H W pixels (rows, columns), 3 colours (red, green, blue).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor


def to_tensor(pixels_BHWC: UInt8[np.ndarray, "B H W 3"]) -> UInt8[Tensor, "B 3 H W"]:
    """Returns a batch of decoded images as a tensor that shares the array's memory.

    Args:
        pixels_BHWC: sRGB values in 0..255; torch warns of an array that is not writable.

    Returns:
        A view with the colour axis moved to the front, so its memory layout is channels last.
    """
    return torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2)
