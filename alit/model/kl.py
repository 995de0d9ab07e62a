"""The KL base tokenizer: the VAE of the published continuous models.

Shapes: B batch, D base latent width, h w base grid, G base tokens.
"""

from __future__ import annotations

from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from alit.model.base import BaseTokens
from alit.model.config import CodeMixing, KLConfig


class KL(nn.Module):
    """Latent-diffusion KL autoencoder over diffusers' module, deterministic: the posterior's mean, never a sample.

    Images stay in [0, 1] on both sides, and predictions are decoded without undoing `latent_scale`: the published
    models were finetuned to exactly that.
    """

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # heavy, and only this base needs it

        levels = len(config.channels)
        self.prediction_dim = config.latent_dim
        self.latent_scale = config.latent_scale
        layout: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "block_out_channels": config.channels,
            "layers_per_block": config.blocks,
            "latent_channels": config.latent_dim,
            "norm_num_groups": 32,
        }
        self.autoencoder: Any = AutoencoderKL(**layout)

    @property
    def last_layer(self) -> Tensor:
        return self.autoencoder.decoder.conv_out.weight

    def posterior(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, unscaled, [B, D, h, w] each; for training."""
        found = self.autoencoder.encode(images_BCHW).latent_dist
        return found.mean, found.logvar

    def encode(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> BaseTokens:
        latents = self.autoencoder.encode(images_BCHW).latent_dist.mean * self.latent_scale
        return BaseTokens(latents, latents, None)

    def predicted(self, predictions_BGO: Float[Tensor, "B G O"], mixing: CodeMixing) -> Tensor:
        return rearrange(predictions_BGO, "b (h w) d -> b d h w", h=round(predictions_BGO.shape[1] ** 0.5))

    def decode(self, latents_BDhw: Tensor) -> Tensor:
        return self.autoencoder.decode(latents_BDhw).sample
