"""The interface of the 2D base tokenizers, which latent distillation builds on.

A base tokenizer encodes images as a grid of latents, and decodes predictions of that grid to images. The rest of the
library depends on `Base` only.

Shapes: B batch, C channels, D latent width, H W pixels, h w base grid, G = h*w base tokens, O prediction width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alit.model.config import CodeMixing


class BaseTokens(NamedTuple):
    """A batch of images, encoded by the base tokenizer.

    Attributes:
        latents_BDhw: The input of the distillation encoder.
        target_BDhw: The latents of a perfect prediction: quantized for a discrete base, else `latents_BDhw`.
        ids_BG: Codebook ids in raster order; None for a continuous base.
    """

    latents_BDhw: Tensor
    target_BDhw: Tensor
    ids_BG: Tensor | None

    def take(self, rows: Tensor) -> BaseTokens:
        """Returns the tokens of some images."""
        ids = None if self.ids_BG is None else self.ids_BG[rows]
        return BaseTokens(self.latents_BDhw[rows], self.target_BDhw[rows], ids)

    @staticmethod
    def concatenate(parts: Sequence[BaseTokens]) -> BaseTokens:
        """Joins one or more batches of the same base."""
        ids = [part.ids_BG for part in parts if part.ids_BG is not None]
        return BaseTokens(
            torch.cat([part.latents_BDhw for part in parts]),
            torch.cat([part.target_BDhw for part in parts]),
            torch.cat(ids) if ids else None,
        )


class Base(Protocol):
    """The interface of a base tokenizer."""

    prediction_dim: int
    """The width of a prediction for one base token: logits over the codebook, or the latent itself."""

    @property
    def last_layer(self) -> Tensor:
        """The weight of the last layer, at which adversarial and reconstruction loss are balanced."""
        ...

    def encode(self, images_BCHW: Tensor) -> BaseTokens:
        """Encodes images in [0, 1]."""
        ...

    def predicted(self, predictions_BGO: Tensor, mixing: CodeMixing) -> Tensor:
        """Converts predictions to base latents [B, D, h, w]; `mixing` is that of `AlitConfig`."""
        ...

    def decode(self, latents_BDhw: Tensor) -> Tensor:
        """Decodes base latents to images in [0, 1], unclamped."""
        ...
