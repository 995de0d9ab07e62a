"""The recurrent latent-distillation encoder and its decoder (arXiv 2411.02393).

Shapes: B batch, G base tokens, g base tokens along one side, n latents per iteration, N latents so far, S sequence
(1 class token, G image tokens, N latents, in that order), D width, C code width, O prediction width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from alit.model.config import AlitConfig
from alit.model.layers import Block


def _embedding(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5)


class LatentEncoder(nn.Module):
    """Distils base tokens into latents.

    Each iteration adds `latents_per_iteration` latents and rewrites all of them. New latents start from learned
    embeddings, which differ between iterations by `iteration_embedding` only.
    """

    def __init__(self, config: AlitConfig) -> None:
        super().__init__()
        width, tokens, new = config.width, config.grid**2, config.latents_per_iteration
        self.image_tokens = tokens
        self.patch_embed = nn.Conv2d(3, width - config.base.latent_dim, config.base.patch_size, config.base.patch_size)
        self.class_embedding = _embedding(1, width)
        self.positions = _embedding(tokens + 1, width)
        self.mask_token = _embedding(1, width)
        self.latent_tokens = _embedding(new, width)
        self.latent_positions = _embedding(new, width)
        self.iteration_embedding = _embedding(config.iterations, new, width)
        self.norm_pre = nn.LayerNorm(width)
        self.norm_recursive = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm_post = nn.LayerNorm(width)
        self.to_code = nn.Linear(width, config.code_dim)

    def _with_new_latents(self, x_BSD: Tensor, iteration: int) -> Tensor:
        new_nD = self.latent_tokens + self.latent_positions + self.iteration_embedding[iteration]
        return torch.cat([x_BSD, new_nD.expand(len(x_BSD), -1, -1)], dim=1)

    def begin(
        self, images_BCHW: Float[Tensor, "B 3 H W"], latents_BDgg: Float[Tensor, "B _ g g"]
    ) -> Float[Tensor, "B S D"]:
        """Returns the input sequence of the first iteration, from images in [0, 1] and their base latents."""
        tokens_BDgg = torch.cat([latents_BDgg, self.patch_embed(images_BCHW)], dim=1)
        tokens_BGD = F.normalize(rearrange(tokens_BDgg, "b d h w -> b (h w) d"), dim=-1, eps=1e-12)
        image_BSD = torch.cat([self.class_embedding.expand(len(tokens_BGD), 1, -1), tokens_BGD], dim=1)
        return self.norm_pre(self._with_new_latents(image_BSD + self.positions, 0))

    def iterate(self, x_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Runs one pass of the shared blocks."""
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return x_BSD

    def latents(self, x_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B N D"]:
        """Returns the latents of a sequence, in order of creation."""
        return x_BSD[:, 1 + self.image_tokens :]

    def codes(self, latents_BND: Float[Tensor, "B N D"]) -> Float[Tensor, "B N C"]:
        """Projects latents to factorized codes, which the rollout does not read again."""
        return self.to_code(self.norm_post(latents_BND))

    def mask(self, x_BSD: Float[Tensor, "B S D"], halted_BG: Bool[Tensor, "B G"]) -> Float[Tensor, "B S D"]:
        """Replaces halted image tokens with the mask token at their position."""
        class_B1D, image_BGD, latents_BND = x_BSD.split(
            [1, self.image_tokens, x_BSD.shape[1] - 1 - self.image_tokens], 1
        )
        image_BGD = torch.where(halted_BG.unsqueeze(-1), self.positions[1:] + self.mask_token, image_BGD)
        return torch.cat([class_B1D, image_BGD, latents_BND], dim=1)

    def grow(self, x_BSD: Float[Tensor, "B S D"], iteration: int) -> Float[Tensor, "B S2 D"]:
        """Adds the new latents of a later iteration (1, 2, ...)."""
        return self.norm_recursive(self._with_new_latents(x_BSD, iteration))

    def attention(self, x_BSD: Float[Tensor, "B S D"]) -> tuple[Tensor, Float[Tensor, "B N G"]]:
        """Runs `iterate` and records the attention of latents to image tokens.

        Returns:
            The sequence, and each latent's shares of attention, means over blocks and heads, which sum to 1.
        """
        first = 1 + self.image_tokens
        total: Tensor | None = None
        for block in self.blocks:
            assert isinstance(block, Block)
            weights = block.attention.weights(block.norm_attention(x_BSD))[:, :, first:, 1:first].mean(1)
            total = weights if total is None else total + weights
            x_BSD = block(x_BSD)
        assert total is not None
        return x_BSD, total / total.sum(-1, keepdim=True)


class LatentDecoder(nn.Module):
    """Predicts every base token from the latent codes alone.

    Args:
        config: The architecture.
        prediction_dim: The width of a prediction, see `Base`.
    """

    def __init__(self, config: AlitConfig, prediction_dim: int) -> None:
        super().__init__()
        width, tokens = config.width, config.grid**2
        self.image_tokens = tokens
        self.code_embed = nn.Linear(config.code_dim, width)
        self.code_positions = _embedding(config.max_tokens, width)
        self.class_embedding = _embedding(1, width)
        self.mask_token = _embedding(1, width)
        self.positions = _embedding(tokens + 1, width)
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm_post = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, prediction_dim))

    def forward(self, codes_BNC: Float[Tensor, "B N C"]) -> Float[Tensor, "B G O"]:
        """Returns the predictions for all base tokens, in raster order."""
        codes_BND = self.code_embed(codes_BNC) + self.code_positions[: codes_BNC.shape[1]]
        slots_SD = torch.cat([self.class_embedding, self.mask_token.expand(self.image_tokens, -1)]) + self.positions
        x_BSD = self.norm_pre(torch.cat([slots_SD.expand(len(codes_BND), -1, -1), codes_BND], dim=1))
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.head(self.norm_post(x_BSD[:, 1 : 1 + self.image_tokens]))


def initialize(module: nn.Module) -> None:
    """Initializes linear and convolutional layers in place, as published: truncated normal (0.02), zero biases."""
    for part in _linear_parts(module):
        nn.init.trunc_normal_(part.weight, std=0.02)
        if part.bias is not None:
            nn.init.zeros_(part.bias)


def _linear_parts(module: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            yield part
