"""Conversion of a published state dict (ShivamDuggal4/adaptive-length-tokenizer) to this library's own layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from alit.errors import CheckpointError
from alit.model.config import AlitConfig, Halting
from alit.official.architecture import PublishedStage, config_from_shapes
from alit.official.checkpoint_file import has_gan, read_checkpoint
from alit.official.names import GAN, published_name, published_shape
from alit.tokenizer import Alit
from alit.weights import save_weights


class Converted(NamedTuple):
    """A published state dict in this library's layout.

    Attributes:
        config: The architecture.
        state: Fits `Alit(config)`; fp32, and views of the published tensors where those were fp32.
    """

    config: AlitConfig
    state: dict[str, Tensor]


def convert(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    heads: int | None = None,
    stage: PublishedStage | None = None,
    halting: Halting = "off",
    halting_threshold: float = 0.55,
) -> str:
    """Converts a published checkpoint to a weights folder.

    Args:
        checkpoint: The `.pth` file. Its `ema` state dict takes precedence over `model`; a bare state dict is accepted.
        folder: The folder to write; replaced if it is a weights folder.
        heads: See `from_official`.
        stage: See `from_official`; the training arguments in the file are consulted before the default.
        halting: See `from_official`.
        halting_threshold: See `from_official`.

    Returns:
        The fingerprint of the weights.

    Raises:
        CheckpointError: The file is not a checkpoint, is truncated, would run code, or has another layout than the
            published one.
        WeightsError: The folder exists and is something else.
    """
    checkpoint = Path(checkpoint)
    try:
        envelope, state, saved_stage = read_checkpoint(checkpoint)
        if stage is None and not has_gan(state):
            stage = saved_stage
        config, converted = from_official(
            state, heads=heads, stage=stage, halting=halting, halting_threshold=halting_threshold
        )
        for name, tensor in converted.items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"tensor {published_name(name, config)!r} holds NaN or infinity")
    except CheckpointError as error:
        raise CheckpointError(f"{str(checkpoint)!r} cannot be converted: {error}") from error.__cause__
    with torch.device("meta"):
        model = Alit(config)
    model.load_state_dict(converted, assign=True)
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = {
        "source": checkpoint.name,
        "source_sha256": digest,
        "source_envelope": envelope,
        "stage": 2 if config.mixing == "soft" else 1,
    }
    return save_weights(folder, model, provenance=provenance)


def from_official(
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    stage: PublishedStage | None = None,
    halting: Halting = "off",
    halting_threshold: float = 0.55,
) -> Converted:
    """Derives the architecture from a published state dict, and renames its tensors.

    Args:
        state: The tensors under their published names. Those that start with `gan_losses.` are dropped; every other
            one must fit.
        heads: Attention heads; known for the published presets, required for any other width and depth.
        stage: The training stage: 2 decodes a VQGAN base softly, 1 by the likeliest code. By default 2 where
            `gan_losses.*` is present, else 1.
        halting: The halting mode; off by default, as in the training of stage 2.
        halting_threshold: The probability at which base tokens halt.

    Raises:
        CheckpointError: A tensor is missing, has another shape or is unknown (the first one is named), or the
            architecture is impossible.
    """
    if stage is None:
        stage = 2 if has_gan(state) else 1
    if stage not in (1, 2):
        raise CheckpointError(f"stage must be 1 or 2, got {stage!r}")
    remaining = {name: tensor for name, tensor in state.items() if not name.startswith(GAN)}
    config = config_from_shapes(remaining, heads, stage, halting, halting_threshold)
    with torch.device("meta"):
        expected = Alit(config).state_dict()
    converted = {}
    for name, like in expected.items():
        published = published_name(name, config)
        shape = published_shape(published, tuple(like.shape))
        if published not in remaining:
            raise CheckpointError(f"tensor {published!r} is missing; expected the shape {shape}")
        tensor = remaining.pop(published)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"tensor {published!r} has the shape {tuple(tensor.shape)}, expected {shape}")
        converted[name] = tensor.detach().float().reshape(like.shape)
    if remaining:
        raise CheckpointError(f"tensor {min(remaining)!r} has no place in the published layout")
    return Converted(config, converted)
