"""Names and shapes of the published tensors.

The published layout is that of github.com/ShivamDuggal4/adaptive-length-tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from alit.model.config import AlitConfig

GAN = "gan_losses."
"""Prefix of stage 2's discriminators and perceptual networks, which only training uses."""
VQGAN_PREFIX, KL_PREFIX = "base_tokenizer.vqgan.", "base_tokenizer.vae."

# From our names to the published ones; every rule is applied, in this order. "up.-i" counts levels from the coarsest.
_RENAMES = [
    (re.compile(ours), published)
    for ours, published in (
        # latent distillation
        (r"^(encoder|decoder)\.positions$", r"\1_positional_embedding"),
        (r"^(encoder|decoder)\.(class_embedding|mask_token)$", r"\1_\2"),
        (r"^encoder\.latent_tokens$", "latent_tokens"),
        (r"^encoder\.latent_positions$", "latent_token_positional_embedding"),
        (r"^encoder\.iteration_embedding$", "timestep_embedding"),
        (r"^encoder\.norm_(pre|post|recursive)\.", r"encoder_ln_\1."),
        (r"^encoder\.to_code\.", "pre_quantizer_mlp."),
        (r"^encoder\.patch_embed\.", "patch_embed."),
        (r"^codebook\.", "quantize.embedding."),
        (r"^decoder\.code_positions$", "decoder.latent_token_positional_embedding"),
        (r"^decoder\.code_embed\.", "decoder.decoder_embed."),
        (r"^decoder\.norm_(pre|post)\.", r"decoder.ln_\1."),
        (r"^decoder\.head\.", "decoder.ffn."),
        (r"^(encoder|decoder)\.blocks\.", r"\1.transformer."),
        (r"\.norm_attention\.", ".ln_1."),
        (r"\.attention\.qkv\.", ".attn.in_proj_"),
        (r"\.attention\.out\.", ".attn.out_proj."),
        (r"\.norm_mlp\.", ".ln_2."),
        (r"\.mlp\.0\.", ".mlp.c_fc."),
        (r"\.mlp\.2\.", ".mlp.c_proj."),
        # KL base: diffusers' names
        (r"^base\.autoencoder\.", KL_PREFIX),
        (r"\.down_blocks\.", ".down."),
        (r"\.up_blocks\.", ".up.-"),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
        (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.resnets\.", ".block."),
        (r"\.attentions\.", ".attn."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"\.conv_norm_out\.", ".norm_out."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.group_norm\.", ".norm."),
        (r"\.to_(q|k|v)\.", r".\1."),
        (r"\.to_out\.0\.", ".proj_out."),
        # VQGAN base
        (r"^base\.codebook\.", f"{VQGAN_PREFIX}quantize.embedding."),
        (r"^base\.encoder\.levels\.(\d+)\.", rf"{VQGAN_PREFIX}encoder.down.\1.block."),
        (r"^base\.decoder\.levels\.(\d+)\.", rf"{VQGAN_PREFIX}decoder.up.-\1.block."),
        (r"^base\.decoder\.upsamples\.(\d+)\.", rf"{VQGAN_PREFIX}decoder.up.-\1.upsample.conv."),
        (r"^base\.(encoder|decoder)\.mid\.0\.", rf"{VQGAN_PREFIX}\1.mid.block_1."),
        (r"^base\.(encoder|decoder)\.mid\.1\.", rf"{VQGAN_PREFIX}\1.mid.block_2."),
        (r"^base\.", VQGAN_PREFIX),
        (r"\.shortcut\.", ".nin_shortcut."),
    )
]

# Published tensors with extra axes of size 1, by their published names.
_EXTRA_AXES: list[tuple[re.Pattern[str], Callable[[tuple[int, ...]], tuple[int, ...]]]] = [
    (re.compile(r"^(encoder|decoder)_mask_token$"), lambda shape: (1, *shape)),
    (re.compile(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$"), lambda shape: (*shape, 1, 1)),
]


def published_name(name: str, config: AlitConfig) -> str:
    """Returns the published name of a tensor of `Alit(config)`."""
    for pattern, published in _RENAMES:
        name = pattern.sub(published, name)
    return re.sub(r"\.up\.-(\d+)", lambda match: f".up.{len(config.base.channels) - 1 - int(match[1])}", name)


def published_shape(published: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a published tensor, which may have extra axes of size 1.

    Args:
        published: The tensor's published name.
        shape: Its shape in this library.
    """
    for pattern, with_axes in _EXTRA_AXES:
        shape = with_axes(shape) if pattern.search(published) else shape
    return shape
