"""Validation of tokens that come from outside.

Shapes: N latents, C code width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from alit.model.config import AlitConfig

Tokens = Tensor | np.ndarray | Sequence[int]


def check_tokens(index: int, row: Tensor, config: AlitConfig) -> Tensor:
    """Checks that a model of this config can decode an image's tokens.

    Args:
        index: The number of the image in its batch, for the error message.
        row: Ids [N], or codes [N, C] of continuous latents.
        config: The model's config.

    Returns:
        The ids as int64, or the codes unchanged.

    Raises:
        ValueError: The model does not have this length, or an id is outside its codebook.
    """
    if row.ndim != (2 if config.codebook_size is None else 1) or len(row) not in config.lengths:
        choices = ", ".join(map(str, config.lengths))
        raise ValueError(f"image {index}: this model decodes {choices} tokens, got the shape {tuple(row.shape)}")
    if config.codebook_size is None:
        if row.shape[1] != config.code_dim:
            raise ValueError(f"image {index}: codes must be {config.code_dim} wide, got {row.shape[1]}")
        return row
    if row.is_floating_point():
        raise ValueError(f"image {index}: ids must be whole numbers, got {row.dtype}")
    row, largest = row.long(), config.codebook_size - 1
    if int(row.min()) < 0 or int(row.max()) > largest:
        raise ValueError(f"image {index}: ids must lie from 0 to {largest}, got {int(row.min())} to {int(row.max())}")
    return row
