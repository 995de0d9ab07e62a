"""What a model makes of a batch of images, measured image by image: shared by validation and evaluation.

Shapes: B batch, K lengths, N latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alit.metrics import pixel
from alit.metrics.lpips import Perceptual
from alit.model.base import BaseTokens
from alit.tokenizer import Alit

HIGHEST_PSNR = 100.0
"""In dB; what is counted for equal pictures, whose own infinity would leave no mean."""

GRADIENT_BINS = 64


class Distances(NamedTuple):
    """Of pictures from their images, float32 [B] each."""

    l1: np.ndarray
    """Of the unclamped pictures, as the criteria see it."""
    mse: np.ndarray
    psnr: np.ndarray
    """In dB, `HIGHEST_PSNR` at most; this and what follows of pictures clamped to [0, 1]."""
    ssim: np.ndarray
    lpips: np.ndarray | None


class Reconstructions(NamedTuple):
    """One way of encoding a batch."""

    images: Tensor
    """Unclamped, [B, 3, S, S]."""
    ids: np.ndarray | None
    """The codes it was made from, [B, N]; None for continuous ones."""


def distances(images: Tensor, pictures: Tensor, perceptual: Perceptual | None = None) -> Distances:
    """Of floats [B, 3, S, S] in [0, 1]."""
    clamped = pictures.clamp(0, 1)

    def array(x: Tensor) -> np.ndarray:
        return x.float().cpu().numpy()

    return Distances(
        l1=array(pixel.l1(images, pictures)),
        mse=array(pixel.mse(images, clamped)),
        psnr=array(pixel.psnr(images, clamped).clamp(max=HIGHEST_PSNR)),
        ssim=array(pixel.ssim(images, clamped)),
        lpips=None if perceptual is None else array(perceptual(images, clamped)),
    )


def to_float(model: Alit, images_u8: Tensor) -> Tensor:
    """uint8 images [B, 3, S, S] as the model takes them."""
    return images_u8.to(model.encoder.positions.device).float() / 255


@torch.inference_mode()
def reconstruct_base(model: Alit, images: Tensor, base: BaseTokens | None = None) -> Reconstructions:
    """The base tokenizer's own reconstruction."""
    base = model.base.encode(images) if base is None else base
    ids = None if base.ids_BG is None else base.ids_BG.cpu().numpy()
    return Reconstructions(model.base.decode(base.target_BDhw), ids)


@torch.inference_mode()
def reconstruct_lengths(model: Alit, images: Tensor, base: BaseTokens | None = None) -> Iterator[Reconstructions]:
    """The reconstruction from every length, shortest first."""
    for step in model.rollout(images, base=base):
        ids = None if step.ids_BN is None else step.ids_BN.cpu().numpy()
        yield Reconstructions(model.reconstruct(step.codes_BNC), ids)


def thumbnail(images: Tensor) -> Tensor:
    """What a 4 x 4 thumbnail keeps of floats [B, 3, S, S]: means over areas, enlarged bicubically."""
    small = F.interpolate(images, size=4, mode="area")
    return F.interpolate(small, size=images.shape[-1], mode="bicubic").clamp(0, 1)


def mean_color(images: Tensor) -> Tensor:
    """What one colour keeps of floats [B, 3, S, S]."""
    return images.mean(dim=(2, 3), keepdim=True).expand_as(images)


def gradient_entropy(images_u8: Tensor) -> np.ndarray:
    """How much is going on in uint8 images [B, 3, S, S]: the entropy of their gradients' magnitudes, float32 [B].

    Luma is Rec. 601's, in [0, 1]; a pixel's gradient its differences to the pixel on the right and to the one below,
    without the last column and row; magnitudes, from 0 to the square root of 2, fall into 64 bins of equal width.

    Returns:
        In bits, from 0 (a flat image) to 6.
    """
    weights = torch.tensor([0.299, 0.587, 0.114], device=images_u8.device).view(3, 1, 1) / 255
    luma = (images_u8.float() * weights).sum(1)  # [B, S, S]
    right, below = luma[:, :-1, 1:] - luma[:, :-1, :-1], luma[:, 1:, :-1] - luma[:, :-1, :-1]
    bins = (torch.hypot(right, below) * (GRADIENT_BINS / 2**0.5)).long().clamp(max=GRADIENT_BINS - 1).flatten(1)
    counts = torch.zeros(len(bins), GRADIENT_BINS, device=bins.device).scatter_add_(
        1, bins, torch.ones_like(bins) * 1.0
    )
    share = counts / counts.sum(1, keepdim=True)
    return (torch.special.entr(share).sum(1) / torch.log(torch.tensor(2.0))).cpu().numpy()


def perplexity(ids: np.ndarray, size: int) -> float:
    """The number of codes that are used as if evenly: e to the entropy of how often each is chosen."""
    counts = np.bincount(ids.reshape(-1), minlength=size)
    share = counts[counts > 0] / max(1, counts.sum())
    return float(np.exp(-(share * np.log(share)).sum()))


def first_within(errors: np.ndarray, threshold: float) -> np.ndarray:
    """The index of the first length whose error is at most `threshold`, else of the longest: [K, B] to [B]."""
    met = errors <= np.float32(threshold)
    return np.where(met.any(0), met.argmax(0), len(errors) - 1)
