"""Validation during training: distances, chosen lengths, use of the codebook, and a grid of images.

Shapes: B batch, K lengths, S side in pixels, H and W height and width of the grid in pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from alit.encoding.criteria import parse
from alit.images.encode import to_uint8
from alit.reconstruction import distances, first_within, perplexity, reconstruct_base, reconstruct_lengths, to_float
from alit.tokenizer import Alit
from alit.training import distributed
from alit.training.recipes import Stage

BATCH = 32

GRID = 8
"""Images in a grid."""


class Validation(NamedTuple):
    """Results of a validation, over all workers."""

    scalars: dict[str, float]
    """Distances for every length, such as `val_l1_256`, and the perplexity of the codebook, if any."""
    chosen_lengths: list[int] | None
    """Number of images for which the criterion chooses each length [K]; None for the base stage."""
    score: float
    """L1, averaged over the lengths; lower is better."""
    grid: np.ndarray | None
    """Originals above their reconstructions at every length, uint8 [H, W, 3]; on the first worker only."""


def validate(stage: Stage, model: Alit, images_u8: Tensor) -> Validation:
    """Measures a share of the images on every worker, and combines the results.

    Args:
        stage: The training stage; `base` measures the base tokenizer's own reconstruction, the others every length.
        model: The model, in inference mode.
        images_u8: All validation images, uint8 [B, 3, S, S]; the same on every worker.
    """
    share = distributed.own_rows(images_u8) if len(images_u8) >= distributed.workers() else images_u8
    grid_rows: list[list[np.ndarray]] = []
    values: dict[str, list[list[np.ndarray]]] = {"l1": [], "psnr": [], "ssim": []}
    ids = []
    for part in share.split(BATCH):
        images = to_float(model, part)
        results = [reconstruct_base(model, images)] if stage == "base" else list(reconstruct_lengths(model, images))
        measured = [distances(images, result.images) for result in results]
        for name, parts in values.items():
            parts.append([getattr(distance, name) for distance in measured])
        if results[-1].ids is not None:
            ids.append(results[-1].ids)
        if not grid_rows:
            rows = [images[:GRID], *(result.images[:GRID] for result in results)]
            grid_rows = [[*to_uint8(row)] for row in rows]
    local = {name: np.concatenate(parts, axis=1) for name, parts in values.items()}  # [K, B]
    shares = distributed.gathered_objects((local, np.concatenate(ids) if ids else None))
    arrays = {name: np.concatenate([part[name] for part, _ in shares], axis=1) for name in values}
    scalars = _means(stage, model, arrays)
    if ids:
        size = model.base.prediction_dim if stage == "base" else model.config.codebook_size
        assert size is not None
        scalars["perplexity"] = perplexity(np.concatenate([part.reshape(-1) for _, part in shares]), size)
    grid = None
    if distributed.rank() == 0:
        grid = np.concatenate([np.concatenate(row, axis=1) for row in grid_rows], axis=0)
    chosen_lengths = None if stage == "base" else _chosen_lengths(model, arrays)
    return Validation(scalars, chosen_lengths, float(arrays["l1"].mean()), grid)


def _means(stage: Stage, model: Alit, arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the mean of every distance [K, B] over the images, by distance and length."""
    labels = ["base"] if stage == "base" else [str(length) for length in model.config.lengths]
    return {
        f"val_{name}_{label}": float(row.mean())
        for name, array in arrays.items()
        for label, row in zip(labels, array, strict=True)
    }


def _chosen_lengths(model: Alit, arrays: dict[str, np.ndarray]) -> list[int]:
    """Returns the number of images per length under the default criterion, or else under the median L1."""
    criterion = parse(model.config.criterion)
    name = criterion.name
    if name in ("psnr", "ssim"):
        chosen = first_within(-arrays[name], -criterion.threshold)
    else:
        threshold = criterion.threshold if name == "l1" else float(np.median(arrays["l1"]))
        chosen = first_within(arrays["l1"], threshold)
    return np.bincount(chosen, minlength=model.config.iterations).tolist()
