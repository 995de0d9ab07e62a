"""The published model sizes and the packaged default, as functions that return a config."""

from __future__ import annotations

from alit.errors import ConfigError
from alit.model.config import AlitConfig, KLConfig, VQGANConfig
from alit.validation import require


def _maskgit_vqgan() -> VQGANConfig:
    return VQGANConfig(channels=(128, 128, 256, 256, 512), published_shortcut=True)


def _mar_kl() -> KLConfig:
    return KLConfig(channels=(128, 128, 256, 256, 512))


def _published(width: int, depth: int, heads: int, base: str, quantized: bool) -> AlitConfig:
    bases = {"vqgan": _maskgit_vqgan, "kl": _mar_kl}
    require(base in bases, f"base must be vqgan or kl, got {base!r}", ConfigError)
    return AlitConfig(
        base=bases[base](),
        image_size=256,
        width=width,
        depth=depth,
        heads=heads,
        codebook_size=4096 if quantized else None,
    )


def tiny(*, base: str = "vqgan", quantized: bool = True) -> AlitConfig:
    """Returns the published ALIT-tiny: 256 px, 32 to 256 tokens, 53 M parameters without the base."""
    return _published(512, 8, 8, base, quantized)


def small(*, base: str = "vqgan", quantized: bool = True) -> AlitConfig:
    """Returns the published ALIT-small: 256 px, width 1024 with 8 heads, 208 M parameters without the base."""
    return _published(1024, 8, 8, base, quantized)


def base(*, base: str = "vqgan", quantized: bool = True) -> AlitConfig:
    """Returns the published ALIT-base: 256 px, 174 M parameters without the base."""
    return _published(768, 12, 12, base, quantized)


def semilarge(*, base: str = "vqgan", quantized: bool = True) -> AlitConfig:
    """Returns the published ALIT-semilarge: 256 px, 409 M parameters without the base."""
    return _published(1024, 16, 16, base, quantized)


def nano() -> AlitConfig:
    """Returns the packaged default: 64 px, 16 to 64 tokens over an 8 x 8 base grid, trainable on two CPU cores."""
    return AlitConfig(
        base=VQGANConfig(channels=(32, 32, 64, 128), blocks=1, latent_dim=16, codebook_size=1024, norm_groups=4),
        image_size=64,
        width=128,
        depth=3,
        heads=4,
        latents_per_iteration=16,
        iterations=4,
        codebook_size=2048,
    )


PRESETS = {"nano": nano, "tiny": tiny, "small": small, "base": base, "semilarge": semilarge}
