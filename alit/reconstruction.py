"""Reconstructions of a batch of images and their distances, image by image, for validation and evaluation.

Shapes: B batch, K lengths, N latents, S side in pixels.
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
"""In dB; replaces the infinite value of equal images, with which means would be infinite."""

GRADIENT_BINS = 64


class Distances(NamedTuple):
    """Distances of reconstructions from their images, float32 [B] each.

    Attributes:
        l1: Of the unclamped reconstructions, as in the criteria; the others are of reconstructions clamped to [0, 1].
        mse: Mean squared error.
        psnr: In dB, at most `HIGHEST_PSNR`.
        ssim: Structural similarity.
        lpips: None if the network is not available.
    """

    l1: np.ndarray
    mse: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray
    lpips: np.ndarray | None


class Reconstructions(NamedTuple):
    """A batch of images, reconstructed from one length or by the base tokenizer.

    Attributes:
        images: The reconstructions, unclamped, [B, 3, S, S].
        ids: The ids that they were decoded from, [B, N]; None for continuous codes.
    """

    images: Tensor
    ids: np.ndarray | None


def distances(images: Tensor, reconstructions: Tensor, perceptual: Perceptual | None = None) -> Distances:
    """Measures reconstructions.

    Args:
        images: Floats [B, 3, S, S] in [0, 1].
        reconstructions: Likewise, but unclamped.
        perceptual: LPIPS, if available.
    """
    clamped = reconstructions.clamp(0, 1)

    def array(x: Tensor) -> np.ndarray:
        return x.float().cpu().numpy()

    return Distances(
        l1=array(pixel.l1(images, reconstructions)),
        mse=array(pixel.mse(images, clamped)),
        psnr=array(pixel.psnr(images, clamped).clamp(max=HIGHEST_PSNR)),
        ssim=array(pixel.ssim(images, clamped)),
        lpips=None if perceptual is None else array(perceptual(images, clamped)),
    )


def to_float(model: Alit, images_u8: Tensor) -> Tensor:
    """Converts uint8 images [B, 3, S, S] to floats in [0, 1] on the model's device."""
    return images_u8.to(model.encoder.positions.device).float() / 255


@torch.inference_mode()
def reconstruct_base(model: Alit, images: Tensor, base: BaseTokens | None = None) -> Reconstructions:
    """Reconstructs images with the base tokenizer alone; `base` are their base tokens, if already known."""
    base = model.base.encode(images) if base is None else base
    ids = None if base.ids_BG is None else base.ids_BG.cpu().numpy()
    return Reconstructions(model.base.decode(base.target_BDhw), ids)


@torch.inference_mode()
def reconstruct_lengths(model: Alit, images: Tensor, base: BaseTokens | None = None) -> Iterator[Reconstructions]:
    """Yields the reconstruction from every length, shortest first; `base` are the base tokens, if already known."""
    for step in model.rollout(images, base=base):
        ids = None if step.ids_BN is None else step.ids_BN.cpu().numpy()
        yield Reconstructions(model.reconstruct(step.codes_BNC), ids)


def thumbnail(images: Tensor) -> Tensor:
    """Reduces floats [B, 3, S, S] to 4 x 4 area means, and enlarges these bicubically to the original size."""
    small = F.interpolate(images, size=4, mode="area")
    return F.interpolate(small, size=images.shape[-1], mode="bicubic").clamp(0, 1)


def mean_color(images: Tensor) -> Tensor:
    """Replaces every pixel of floats [B, 3, S, S] with the image's mean colour."""
    return images.mean(dim=(2, 3), keepdim=True).expand_as(images)


def gradient_entropy(images_u8: Tensor) -> np.ndarray:
    """Returns the entropy of gradient magnitudes of uint8 images [B, 3, S, S], a measure of their complexity.

    The luma is that of Rec. 601, in [0, 1]. A pixel's gradient consists of its differences to the pixel on the right
    and to the one below, without the last column and row. Magnitudes, from 0 to the square root of 2, are counted in 64
    bins of equal width.

    Returns:
        Bits, from 0 (a flat image) to 6, float32 [B].
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
    """Returns the perplexity of ids in a codebook of `size` codes: e to the entropy of their frequencies."""
    counts = np.bincount(ids.reshape(-1), minlength=size)
    share = counts[counts > 0] / max(1, counts.sum())
    return float(np.exp(-(share * np.log(share)).sum()))


def first_within(errors: np.ndarray, threshold: float) -> np.ndarray:
    """Returns the index [B] of the first length whose error [K, B] is at most `threshold`, else of the longest."""
    met = errors <= np.float32(threshold)
    return np.where(met.any(0), met.argmax(0), len(errors) - 1)
