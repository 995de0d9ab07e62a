"""Measurements of every image: small arrays, computed batch by batch and collected from all workers.

Shapes: B batch, S the model's side in pixels, K lengths, V reconstructions of an image (one per length, shortest
first, then the base tokenizer's, a 4 x 4 thumbnail and the mean colour), T tokens of all lengths together, G base
tokens, C codecs, D features.
"""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alit.errors import AlitError
from alit.images.encode import encode_image, to_uint8
from alit.images.tensors import to_tensor
from alit.metrics import pixel
from alit.metrics.fid import Moments
from alit.model.config import AlitConfig, VQGANConfig
from alit.reconstruction import (
    distances,
    gradient_entropy,
    mean_color,
    reconstruct_base,
    reconstruct_lengths,
    thumbnail,
    to_float,
)
from alit.tokenizer import Alit
from jobs.evaluation.image_codecs import measure_codecs
from jobs.evaluation.models import EvaluationModels

JPEG_QUALITY = 75
"""The quality of the files whose sizes estimate the complexity of an image."""
FEATURE_CHUNK = 1024
"""Images whose features are gathered before an update of the moments, which costs the same for few as for many."""


def bits_per_token(config: AlitConfig) -> float | None:
    """Returns the information of one token in bits; None for continuous latents."""
    return None if config.codebook_size is None else math.log2(config.codebook_size)


def bits_per_base_token(config: AlitConfig) -> float | None:
    """Returns the information of one base token in bits; None for a continuous base."""
    return math.log2(config.base.codebook_size) if isinstance(config.base, VQGANConfig) else None


class Measurements(NamedTuple):
    """Measurements of B images, float32 unless noted; what was not measured has an axis of length 0."""

    l1: np.ndarray
    """[B, V], like all distances; see `alit.reconstruction.Distances`."""
    mse: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray
    lpips: np.ndarray
    """[B, V], or [B, 0]."""
    ids: np.ndarray
    """The codes of every length, concatenated, int32 [B, T], or [B, 0]."""
    base_ids: np.ndarray
    """int32 [B, G], or [B, 0]."""
    jpeg_bytes: np.ndarray
    """Size of the image at the model's size as JPEG of quality 75, [B]."""
    gradient_entropy: np.ndarray
    """In bits, [B]."""
    codec_bytes: np.ndarray
    """Sizes of the codecs' files nearest to every length in bytes, [B', C, K]; codecs are measured on B' images."""
    codec_l1: np.ndarray
    codec_psnr: np.ndarray
    codec_smallest_bytes: np.ndarray
    """Sizes at each codec's lowest quality, [B', C]."""
    against_l1: np.ndarray
    """The other model's L1 at the common lengths, then its base's, [B, K' + 1], or [B, 0]."""
    features: np.ndarray
    """Inception features of every length's reconstruction, the base's, and the image, [B, K + 2, D], or [B, 0, 0]."""

    def pack(self) -> bytes:
        """Returns the arrays as bytes that `unpack` reads, without pickle."""
        file = io.BytesIO()
        np.savez(file, **self._asdict())
        return file.getvalue()

    @classmethod
    def unpack(cls, data: bytes) -> Measurements:
        """Returns the arrays that `pack` wrote."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in cls._fields})


@torch.inference_mode()
def measure(models: EvaluationModels, pixels: np.ndarray, with_codecs: np.ndarray) -> Measurements:
    """Measures the reconstructions of a batch.

    Args:
        models: On any device.
        pixels: uint8 [B, S, S, 3], at least one image.
        with_codecs: The images on which image codecs are measured, bool [B].
    """
    model, count = models.model, len(pixels)
    device = model.encoder.positions.device
    images_u8 = to_tensor(pixels).to(device)
    images = to_float(model, images_u8)
    base = model.base.encode(images)
    steps = [*reconstruct_lengths(model, images, base), reconstruct_base(model, images, base)]
    reconstructions = [step.images for step in steps]
    candidates = (*reconstructions, thumbnail(images), mean_color(images))
    errors = [distances(images, candidate, models.perceptual) for candidate in candidates]
    lpips = [error.lpips for error in errors if error.lpips is not None]
    ids = [step.ids for step in steps if step.ids is not None]
    has_ids, has_base_ids = model.codebook is not None, steps[-1].ids is not None
    empty = np.zeros((count, 0), np.float32)
    bits = bits_per_token(model.config)
    targets = [] if bits is None else [length * bits / 8 for length in model.config.lengths]
    codecs = measure_codecs(pixels[with_codecs] if targets else pixels[:0], targets)
    features = np.zeros((count, 0, 0), np.float32)
    if models.inception is not None:
        rounded = [_round_to_uint8(x).to(device) for x in reconstructions]
        features = np.stack([models.inception(x).float().cpu().numpy() for x in (*rounded, images)], axis=1)
    return Measurements(
        l1=np.stack([error.l1 for error in errors], axis=1),
        mse=np.stack([error.mse for error in errors], axis=1),
        psnr=np.stack([error.psnr for error in errors], axis=1),
        ssim=np.stack([error.ssim for error in errors], axis=1),
        lpips=np.stack(lpips, axis=1) if lpips else empty,
        ids=np.concatenate(ids[: len(steps) - 1], axis=1).astype(np.int32) if has_ids else empty.astype(np.int32),
        base_ids=ids[-1].astype(np.int32) if has_base_ids else empty.astype(np.int32),
        jpeg_bytes=np.array([len(encode_image(image, "jpeg", JPEG_QUALITY)) for image in pixels], np.float32),
        gradient_entropy=gradient_entropy(images_u8),
        codec_bytes=codecs.size,
        codec_l1=codecs.l1,
        codec_psnr=codecs.psnr,
        codec_smallest_bytes=codecs.smallest,
        against_l1=empty if models.against is None else _errors_against(models, models.against, images),
        features=features,
    )


def _round_to_uint8(images: Tensor) -> Tensor:
    """Rounds floats to 8 bits, from which published rFID scores are computed."""
    return to_tensor(to_uint8(images)).float() / 255


def _errors_against(models: EvaluationModels, other: Alit, images: Tensor) -> np.ndarray:
    """Returns the other model's L1 at the common lengths, then its base's, [B, K' + 1]."""
    common = models.common_lengths
    base = other.base.encode(images)
    errors = []
    if common:
        for length, step in zip(other.config.lengths, reconstruct_lengths(other, images, base), strict=True):
            if length in common:
                errors.append(pixel.l1(images, step.images))
            if length == common[-1]:
                break
    errors.append(pixel.l1(images, reconstruct_base(other, images, base).images))
    return torch.stack(errors, dim=1).cpu().numpy()


class RejectedImage(NamedTuple):
    """An image that could not be decoded."""

    id: str
    reason: str
    message: str


class BatchMeasurements(NamedTuple):
    """The result of one batch."""

    number: int
    """The batch's position among all batches."""
    measurements: Measurements | None
    """Measurements of the images that could be decoded; None where none could."""
    rejects: list[RejectedImage]


class MeasurementCollector:
    """Collects the batches in any order of arrival; a batch that arrives again, from a retried task, counts once.

    Attributes:
        moments: Moments of the Inception features, one per position on their axis of K + 2; empty where not measured.
    """

    def __init__(self) -> None:
        self._batches: dict[int, BatchMeasurements] = {}
        self._pending_features: list[np.ndarray] = []
        self.moments: list[Moments] = []

    def add(self, batch: BatchMeasurements) -> None:
        """Adds one batch."""
        if batch.number in self._batches:
            return
        measurements = batch.measurements
        if measurements is not None and measurements.features.size:
            self._pending_features.append(measurements.features)
            if sum(map(len, self._pending_features)) >= FEATURE_CHUNK:
                self._update_moments()
            batch = batch._replace(measurements=measurements._replace(features=np.zeros((0, 0, 0), np.float32)))
        self._batches[batch.number] = batch

    @property
    def processed(self) -> int:
        """Number of images so far, rejects included."""
        batches = self._batches.values()
        return sum((len(b.measurements.l1) if b.measurements else 0) + len(b.rejects) for b in batches)

    @property
    def rejects(self) -> list[RejectedImage]:
        """The rejected images, in the input's order."""
        return [reject for number in sorted(self._batches) for reject in self._batches[number].rejects]

    def measurements(self) -> Measurements:
        """Returns the measurements of all images, in the input's order, without features, which are in `moments`.

        Raises:
            AlitError: No image was measured.
        """
        self._update_moments()
        ordered = [self._batches[number].measurements for number in sorted(self._batches)]
        measured = [measurements for measurements in ordered if measurements is not None]
        if not measured:
            rejects = self.rejects
            example = f", such as {rejects[0].id!r}: {rejects[0].message}" if rejects else ""
            raise AlitError(f"there is nothing to measure: {len(rejects)} images could not be decoded{example}")
        return Measurements(*(np.concatenate(columns) for columns in zip(*measured, strict=True)))

    def _update_moments(self) -> None:
        if not self._pending_features:
            return
        features = np.concatenate(self._pending_features)
        self._pending_features = []
        self.moments = self.moments or [Moments(features.shape[2]) for _ in range(features.shape[1])]
        for index, moments in enumerate(self.moments):
            moments.add(torch.from_numpy(np.ascontiguousarray(features[:, index])))
