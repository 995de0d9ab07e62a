"""The VQGAN base tokenizer (Esser et al. 2021, arXiv 2012.09841; in the form of MaskGIT, arXiv 2202.04200).

Shapes: B batch, D base latent width, h w base grid, G base tokens, V codes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from alit.model.base import BaseTokens
from alit.model.config import CodeMixing, VQGANConfig
from alit.precision import full_precision, upcast


def _norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions and a skip connection, with a 1x1 shortcut where the width changes.

    Args:
        in_channels: The width of the input.
        out_channels: The width of the output.
        groups: The number of groups of the group norms.
        published_shortcut: See `VQGANConfig`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, published_shortcut: bool) -> None:
        super().__init__()
        self.published_shortcut = published_shortcut
        self.norm1 = _norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = _norm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if in_channels != out_channels:
            shortcut_in = out_channels if published_shortcut else in_channels
            self.shortcut = nn.Conv2d(shortcut_in, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, in_channels, H, W] to [B, out_channels, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if self.shortcut is None:
            return x + h
        return self.shortcut(h if self.published_shortcut else x) + h


def _blocks(in_channels: int, out_channels: int, config: VQGANConfig, count: int | None = None) -> nn.Sequential:
    widths = [in_channels] + [out_channels] * (count or config.blocks)
    shared = {"groups": config.norm_groups, "published_shortcut": config.published_shortcut}
    return nn.Sequential(*(ResidualBlock(a, b, **shared) for a, b in pairwise(widths)))


class VQGANEncoder(nn.Module):
    """The convolutional encoder: residual blocks, with 2x2 average pooling between levels."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        inputs = (channels[0], *channels)
        self.levels = nn.ModuleList(_blocks(a, b, config) for a, b in zip(inputs, channels, strict=False))
        self.mid = _blocks(channels[-1], channels[-1], config, 2)
        self.norm_out = _norm(config.norm_groups, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.latent_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Encodes images [B, 3, H, W] as latents [B, D, h, w]."""
        x = self.conv_in(x)
        for i, level in enumerate(self.levels):
            x = level(F.avg_pool2d(x, 2) if i else x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class VQGANDecoder(nn.Module):
    """The convolutional decoder: residual blocks, with nearest-neighbour upsampling between levels."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        coarse_first = config.channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_dim, coarse_first[0], 3, padding=1)
        self.mid = _blocks(coarse_first[0], coarse_first[0], config, 2)
        inputs = (coarse_first[0], *coarse_first)
        self.levels = nn.ModuleList(_blocks(a, b, config) for a, b in zip(inputs, coarse_first, strict=False))
        self.upsamples = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in coarse_first[:-1])
        self.norm_out = _norm(config.norm_groups, coarse_first[-1])
        self.conv_out = nn.Conv2d(coarse_first[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Decodes latents [B, D, h, w] to images [B, 3, H, W]."""
        x = self.mid(self.conv_in(x))
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.upsamples):
                x = self.upsamples[i](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """MaskGIT-style VQGAN: convolutions only, nearest code by Euclidean distance; see `Base` for the interface."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.prediction_dim = config.codebook_size
        self.encoder = VQGANEncoder(config)
        self.decoder = VQGANDecoder(config)
        self.codebook = nn.Embedding(config.codebook_size, config.latent_dim)

    @property
    def last_layer(self) -> Tensor:
        """See `Base`."""
        return self.decoder.conv_out.weight

    def nearest(self, latents_BDhw: Float[Tensor, "B D h w"]) -> Tensor:
        """Returns the id of each latent's nearest codebook row, [B, G] in raster order; computed in fp32."""
        with full_precision(latents_BDhw):
            flat = upcast(rearrange(latents_BDhw, "b d h w -> b (h w) d"))
            rows = upcast(self.codebook.weight)
            # |z - e|^2 without |z|^2, which is the same for every row
            return (rows.square().sum(-1) - 2 * flat @ rows.T).argmin(-1)

    def lookup(self, ids_BG: Tensor, height: int) -> Tensor:
        """Returns the codebook rows of ids as a grid of `height` rows, [B, D, h, w]."""
        return rearrange(self.codebook(ids_BG), "b (h w) d -> b d h w", h=height)

    def encode(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> BaseTokens:
        """See `Base`."""
        latents = self.encoder(images_BCHW)
        ids = self.nearest(latents)
        return BaseTokens(latents, self.lookup(ids, latents.shape[2]), ids)

    def predicted(self, predictions_BGO: Float[Tensor, "B G O"], mixing: CodeMixing) -> Tensor:
        """See `Base`."""
        height = round(predictions_BGO.shape[1] ** 0.5)
        if mixing == "hard":
            return self.lookup(predictions_BGO.argmax(-1), height)
        soft = torch.softmax(predictions_BGO, dim=-1) @ self.codebook.weight
        return rearrange(soft, "b (h w) d -> b d h w", h=height)

    def decode(self, latents_BDhw: Tensor) -> Tensor:
        """See `Base`."""
        return self.decoder(latents_BDhw)
