"""What a run looks at while it trains: distances, chosen lengths, use of the codebook, and a grid of pictures.

Shapes: B batch, K lengths.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    numbers: dict[str, Any]
    """Scalars, and `chosen_lengths`: how many images the default threshold gives each length."""
    score: float
    """L1, mean over the lengths; the lower, the better."""
    grid: np.ndarray | None
    """Photographs over what every length makes of them, uint8 [H, W, 3]; on the first worker alone."""


def validate(stage: Stage, model: Alit, images_u8: Tensor) -> Validation:
    """Looks at a share of the images on every worker, and puts the shares together.

    Args:
        stage: of `base`, the base tokenizer's own reconstruction is looked at; else every length.
        model: in inference mode.
        images_u8: all of them, uint8 [B, 3, S, S]; the same on every worker.
    """
    share = distributed.own_rows(images_u8) if len(images_u8) >= distributed.workers() else images_u8
    shown: list[list[np.ndarray]] = []
    found: dict[str, list[list[np.ndarray]]] = {"l1": [], "psnr": [], "ssim": []}
    ids = []
    for part in share.split(BATCH):
        images = to_float(model, part)
        results = [reconstruct_base(model, images)] if stage == "base" else list(reconstruct_lengths(model, images))
        measured = [distances(images, result.images) for result in results]
        for name, parts in found.items():
            parts.append([getattr(distance, name) for distance in measured])
        if results[-1].ids is not None:
            ids.append(results[-1].ids)
        if not shown:
            rows = [images[:GRID], *(result.images[:GRID] for result in results)]
            shown = [[*to_uint8(row)] for row in rows]
    local = {name: np.concatenate(parts, axis=1) for name, parts in found.items()}  # [K, B]
    everywhere = distributed.gathered_objects((local, np.concatenate(ids) if ids else None))
    arrays = {name: np.concatenate([part[name] for part, _ in everywhere], axis=1) for name in found}
    labels = ["base"] if stage == "base" else [str(length) for length in model.config.lengths]
    numbers: dict[str, Any] = {
        f"val_{name}_{label}": float(row.mean())
        for name, array in arrays.items()
        for label, row in zip(labels, array, strict=True)
    }
    if ids:
        size = model.base.prediction_dim if stage == "base" else model.config.codebook_size
        assert size is not None
        numbers["perplexity"] = perplexity(np.concatenate([part.reshape(-1) for _, part in everywhere]), size)
    if stage != "base":
        numbers["chosen_lengths"] = _chosen(model, arrays)
    grid = None
    if distributed.rank() == 0:
        grid = np.concatenate([np.concatenate(row, axis=1) for row in shown], axis=0)
    return Validation(numbers, float(arrays["l1"].mean()), grid)


def _chosen(model: Alit, arrays: dict[str, np.ndarray]) -> list[int]:
    """Images per length under the default criterion, or under an L1 in the middle of what is reached."""
    criterion = parse(model.config.criterion)
    name = criterion.name
    if name in ("psnr", "ssim"):
        chosen = first_within(-arrays[name], -criterion.threshold)
    else:
        threshold = criterion.threshold if name == "l1" else float(np.median(arrays["l1"]))
        chosen = first_within(arrays["l1"], threshold)
    return np.bincount(chosen, minlength=model.config.iterations).tolist()
