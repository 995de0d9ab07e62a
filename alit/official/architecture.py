"""The architecture of a published model, derived from the shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from alit.errors import CheckpointError, ConfigError
from alit.model.config import AlitConfig, Halting, KLConfig, VQGANConfig
from alit.official.names import KL_PREFIX, VQGAN_PREFIX

PublishedStage = Literal[1, 2]
"""Training stage of a published model: 1 is latent distillation, 2 is full finetuning."""

PUBLISHED_HEADS = {(512, 8): 8, (1024, 8): 8, (768, 12): 12, (1024, 16): 16}
"""Attention heads of each published preset, by width and depth: shapes do not show them."""


class _Shapes:
    """Looks up tensor shapes in a state dict."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def of(self, name: str, axes: int) -> tuple[int, ...]:
        """Returns the shape of a tensor that must have this many axes."""
        if name not in self.state:
            raise CheckpointError(f"tensor {name!r} is missing")
        shape = tuple(self.state[name].shape)
        if len(shape) != axes:
            raise CheckpointError(f"tensor {name!r} has the shape {shape}, expected {axes} axes")
        return shape

    def count(self, prefix: str) -> int:
        """Returns one more than the highest index that follows `prefix`."""
        pattern = re.compile(re.escape(prefix) + r"(\d{1,4})\.")
        return 1 + max((int(match[1]) for match in map(pattern.match, self.state) if match), default=-1)


def config_from_shapes(
    state: Mapping[str, Tensor],
    heads: int | None,
    stage: PublishedStage,
    halting: Halting,
    halting_threshold: float,
) -> AlitConfig:
    """Derives a model config from a published state dict.

    Args:
        state: The tensors under their published names; `gan_losses.*` may be missing.
        heads: Attention heads; None for those of the published preset of this width and depth.
        stage: The training stage, which decides how predictions of a VQGAN base are decoded.
        halting: The halting mode of the config.
        halting_threshold: The halting threshold of the config.

    Raises:
        CheckpointError: A tensor is missing or has another number of axes, the shapes describe no possible model, or
            the number of heads is unknown.
    """
    shapes = _Shapes(state)
    base = _base(shapes)
    width = shapes.of("encoder_class_embedding", 2)[1]
    depth = max(shapes.count("encoder.transformer."), shapes.count("decoder.transformer."))
    heads = heads or PUBLISHED_HEADS.get((width, depth))
    if heads is None:
        raise CheckpointError(
            f"width {width} with {depth} blocks is not a published preset, and tensor shapes do not show the number of "
            f"attention heads; pass heads=N"
        )
    rows = shapes.of("encoder_positional_embedding", 2)[0]
    grid = math.isqrt(max(rows - 1, 0))
    if grid**2 != rows - 1 or not grid:
        raise CheckpointError(
            f"tensor 'encoder_positional_embedding' has {rows} rows, expected one more than a square number"
        )
    codebook = "quantize.embedding.weight"
    try:
        return AlitConfig(
            base=base,
            image_size=grid * base.patch_size,
            width=width,
            depth=depth,
            heads=heads,
            latents_per_iteration=shapes.of("latent_tokens", 2)[0],
            iterations=shapes.of("timestep_embedding", 3)[0],
            code_dim=shapes.of("pre_quantizer_mlp.weight", 2)[0],
            codebook_size=shapes.of(codebook, 2)[0] if codebook in shapes.state else None,
            mixing="soft" if stage == 2 else "hard",
            halting=halting,
            halting_threshold=halting_threshold,
        )
    except ConfigError as error:
        raise CheckpointError(f"its shapes and the arguments make no model: {error}") from error


def _base(shapes: _Shapes) -> VQGANConfig | KLConfig:
    prefixes = [prefix for prefix in (VQGAN_PREFIX, KL_PREFIX) if any(name.startswith(prefix) for name in shapes.state)]
    if len(prefixes) != 1:
        raise CheckpointError(
            f"it must hold either {VQGAN_PREFIX}* or {KL_PREFIX}* tensors, it has {'both' if prefixes else 'neither'}; "
            f"a base tokenizer's own file (vqgan.ckpt, vae.ckpt) is not an ALIT checkpoint"
        )
    (prefix,) = prefixes
    levels = shapes.count(f"{prefix}encoder.down.")
    channels = tuple(shapes.of(f"{prefix}encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels))
    blocks = shapes.count(f"{prefix}encoder.down.0.block.")
    try:
        if prefix == KL_PREFIX:
            latent_dim = shapes.of(f"{prefix}post_quant_conv.weight", 4)[0]
            return KLConfig(channels=channels, blocks=blocks, latent_dim=latent_dim)
        codebook_size, latent_dim = shapes.of(f"{prefix}quantize.embedding.weight", 2)
        return VQGANConfig(
            channels=channels,
            blocks=blocks,
            latent_dim=latent_dim,
            codebook_size=codebook_size,
            published_shortcut=True,
        )
    except ConfigError as error:
        raise CheckpointError(f"its base tokenizer's shapes make no model: {error}") from error
