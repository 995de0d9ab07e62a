"""The 2D base tokenizers that the latent distillation stands on.

A base turns images into a grid of latents and predictions of that grid back into images. `Base` is all that the rest of
the library knows of it: another base is one more class here and one more config.

Shapes: B batch, C channels, D latent width, H W pixels, h w base grid, G = h*w base tokens, O prediction width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alit.model.config import CodeMixing


class BaseTokens(NamedTuple):
    """A batch of images as the base sees them."""

    latents_BDhw: Tensor
    """What the distillation encoder reads."""
    target_BDhw: Tensor
    """What a perfect prediction would decode: the quantized latents of a discrete base, else the latents."""
    ids_BG: Tensor | None
    """Codebook ids in raster order, or None for a continuous base."""

    def take(self, rows: Tensor) -> BaseTokens:
        """Some of the images."""
        ids = None if self.ids_BG is None else self.ids_BG[rows]
        return BaseTokens(self.latents_BDhw[rows], self.target_BDhw[rows], ids)

    @staticmethod
    def concatenate(parts: Sequence[BaseTokens]) -> BaseTokens:
        """The images of one or more batches of the same base as one batch."""
        ids = [part.ids_BG for part in parts if part.ids_BG is not None]
        return BaseTokens(
            torch.cat([part.latents_BDhw for part in parts]),
            torch.cat([part.target_BDhw for part in parts]),
            torch.cat(ids) if ids else None,
        )


class Base(Protocol):
    """What a base tokenizer must offer."""

    prediction_dim: int
    """Numbers the distillation decoder predicts per base token: logits over the codebook, or the latent itself."""

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes the pixels, where adversarial losses are balanced."""
        ...

    def encode(self, images_BCHW: Tensor) -> BaseTokens:
        """Images in [0, 1] to base tokens."""
        ...

    def predicted(self, predictions_BGO: Tensor, mixing: CodeMixing) -> Tensor:
        """Predictions to base latents [B, D, h, w]."""
        ...

    def decode(self, latents_BDhw: Tensor) -> Tensor:
        """Base latents to unclamped images in [0, 1]."""
        ...
