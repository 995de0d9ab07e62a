"""Model configurations for fast tests."""

from __future__ import annotations

import json

import torch

from alit.model.config import AlitConfig, VQGANConfig
from alit.tokenizer import Alit

TINY = AlitConfig(
    base=VQGANConfig(channels=(8, 16), blocks=1, latent_dim=8, codebook_size=32, norm_groups=4),
    image_size=16,
    width=32,
    depth=2,
    heads=2,
    latents_per_iteration=4,
    iterations=4,
    code_dim=6,
    codebook_size=64,
)
"""16 px, 4 to 16 tokens."""

SMALL = AlitConfig(
    base=VQGANConfig(channels=(8, 8, 8), blocks=1, latent_dim=8, codebook_size=16, norm_groups=4),
    image_size=32,
    width=16,
    depth=1,
    heads=2,
    latents_per_iteration=4,
    iterations=3,
    codebook_size=32,
)
"""32 px, 4 to 12 tokens."""

SMALLER = AlitConfig(
    base=VQGANConfig(channels=(4, 4), blocks=1, latent_dim=4, codebook_size=8, norm_groups=2),
    image_size=16,
    width=16,
    depth=1,
    heads=2,
    latents_per_iteration=4,
    iterations=3,
    codebook_size=16,
)
"""16 px, 4 to 12 tokens."""

SMALLEST = AlitConfig(
    base=VQGANConfig(channels=(4, 8), blocks=1, latent_dim=4, codebook_size=16, norm_groups=2),
    image_size=8,
    width=16,
    depth=1,
    heads=2,
    latents_per_iteration=2,
    iterations=4,
    code_dim=4,
    codebook_size=16,
)
"""8 px, 2 to 8 tokens."""


def random_model(config: AlitConfig = TINY, seed: int = 0) -> Alit:
    """Returns a model with the random values of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Alit(config).eval()


def through_json(config: AlitConfig) -> AlitConfig:
    """Returns a config that was written as JSON and read."""
    return AlitConfig.from_json(json.loads(json.dumps(config.to_json())))
