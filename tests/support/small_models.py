"""Model configurations small enough to try everything on."""

from __future__ import annotations

from alit.model.config import AlitConfig, VQGANConfig

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
