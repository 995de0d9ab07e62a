"""The KL base tokenizer, the VAE of the published continuous models (Rombach et al. 2022, arXiv 2112.10752).

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
    """Latent-diffusion KL autoencoder on diffusers' module; see `Base` for the interface.

    It is deterministic: base tokens are the posterior's mean, never a sample. Input and output images are in [0, 1],
    and predictions are decoded without undoing `latent_scale`, as in the finetuning of the published models.
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
        """See `Base`."""
        return self.autoencoder.decoder.conv_out.weight

    def posterior(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, Tensor]:
        """Returns mean and log variance of the latents, unscaled, [B, D, h, w] each; for training."""
        distribution = self.autoencoder.encode(images_BCHW).latent_dist
        return distribution.mean, distribution.logvar

    def encode(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> BaseTokens:
        """See `Base`."""
        latents = self.autoencoder.encode(images_BCHW).latent_dist.mean * self.latent_scale
        return BaseTokens(latents, latents, None)

    def predicted(self, predictions_BGO: Float[Tensor, "B G O"], mixing: CodeMixing) -> Tensor:
        """See `Base`; `mixing` has no effect."""
        return rearrange(predictions_BGO, "b (h w) d -> b d h w", h=round(predictions_BGO.shape[1] ** 0.5))

    def decode(self, latents_BDhw: Tensor) -> Tensor:
        """See `Base`."""
        return self.autoencoder.decode(latents_BDhw).sample
