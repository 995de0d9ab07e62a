"""What an evaluation keeps of every image: small numbers, measured batch by batch, gathered from all workers.

Shapes: B batch, S the model's side in pixels, K lengths, V versions of an image (what every length makes of it, the
shortest first, then the base tokenizer, a 4 x 4 thumbnail and its mean colour), T tokens of all lengths together,
G base tokens, C codecs, D features.
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
from jobs.evaluation.image_codecs import coded
from jobs.evaluation.models import Rulers

JPEG_QUALITY = 75
"""Of the files whose sizes stand for how much there is in an image."""


WAITING = 1024
"""Images whose features are gathered before they go into the moments, which cost the same for few as for many."""


def bits_per_token(config: AlitConfig) -> float | None:
    """What one token can tell; None of continuous latents."""
    return None if config.codebook_size is None else math.log2(config.codebook_size)


def bits_per_base_token(config: AlitConfig) -> float | None:
    """What one token of the base can tell; None of a continuous one."""
    return math.log2(config.base.codebook_size) if isinstance(config.base, VQGANConfig) else None


class Measured(NamedTuple):
    """Of B images, float32 unless said; what was not measured has an axis of length 0."""

    l1: np.ndarray
    """[B, V], as all distances are; see `jobs.measure.Distances`."""
    mse: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray
    lpips: np.ndarray
    """[B, V], or [B, 0]."""
    ids: np.ndarray
    """The codes of every length, one after another, int32 [B, T], or [B, 0]."""
    base_ids: np.ndarray
    """int32 [B, G], or [B, 0]."""
    jpeg_bytes: np.ndarray
    """Of the image at the model's size, quality 75, [B]."""
    gradient_entropy: np.ndarray
    """In bits, [B]."""
    coded_bytes: np.ndarray
    """Of the codecs' files nearest to every length in bytes, [B', C, K]; B' of the B images are coded."""
    coded_l1: np.ndarray
    coded_psnr: np.ndarray
    smallest_bytes: np.ndarray
    """Of each codec, [B', C]."""
    against_l1: np.ndarray
    """The other model's at the common lengths, then its base's, [B, K' + 1], or [B, 0]."""
    features: np.ndarray
    """Of what every length makes of it, of the base's reconstruction and of the image, [B, K + 2, D], or [B, 0, 0]."""

    def pack(self) -> bytes:
        """As bytes that `unpack` reads; nothing in them is ever run."""
        file = io.BytesIO()
        np.savez(file, **self._asdict())
        return file.getvalue()

    @classmethod
    def unpack(cls, data: bytes) -> Measured:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in cls._fields})


@torch.inference_mode()
def measure(rulers: Rulers, pixels: np.ndarray, code: np.ndarray) -> Measured:
    """Measures a batch.

    Args:
        rulers: of any device.
        pixels: uint8 [B, S, S, 3], at least one image.
        code: which of them the codecs are tried on, bool [B].
    """
    model, count = rulers.model, len(pixels)
    device = model.encoder.positions.device
    images_u8 = to_tensor(pixels).to(device)
    images = to_float(model, images_u8)
    base = model.base.encode(images)
    steps = [*reconstruct_lengths(model, images, base), reconstruct_base(model, images, base)]
    pictures = [step.images for step in steps]
    found = [distances(images, x, rulers.perceptual) for x in (*pictures, thumbnail(images), mean_color(images))]
    lpips = [distance.lpips for distance in found if distance.lpips is not None]
    ids = [step.ids for step in steps if step.ids is not None]
    has_ids, has_base_ids = model.codebook is not None, steps[-1].ids is not None
    nothing = np.zeros((count, 0), np.float32)
    bits = bits_per_token(model.config)
    targets = [] if bits is None else [length * bits / 8 for length in model.config.lengths]
    files = coded(pixels[code] if targets else pixels[:0], targets)
    features = np.zeros((count, 0, 0), np.float32)
    if rulers.inception is not None:
        rounded = [_rounded(x).to(device) for x in pictures]
        features = np.stack([rulers.inception(x).float().cpu().numpy() for x in (*rounded, images)], axis=1)
    return Measured(
        l1=np.stack([distance.l1 for distance in found], axis=1),
        mse=np.stack([distance.mse for distance in found], axis=1),
        psnr=np.stack([distance.psnr for distance in found], axis=1),
        ssim=np.stack([distance.ssim for distance in found], axis=1),
        lpips=np.stack(lpips, axis=1) if lpips else nothing,
        ids=np.concatenate(ids[: len(steps) - 1], axis=1).astype(np.int32) if has_ids else nothing.astype(np.int32),
        base_ids=ids[-1].astype(np.int32) if has_base_ids else nothing.astype(np.int32),
        jpeg_bytes=np.array([len(encode_image(image, "jpeg", JPEG_QUALITY)) for image in pixels], np.float32),
        gradient_entropy=gradient_entropy(images_u8),
        coded_bytes=files.size,
        coded_l1=files.l1,
        coded_psnr=files.psnr,
        smallest_bytes=files.smallest,
        against_l1=nothing if rulers.against is None else _against(rulers, rulers.against, images),
        features=features,
    )


def _rounded(pictures: Tensor) -> Tensor:
    """To 8 bits, as published scores have it."""
    return to_tensor(to_uint8(pictures)).float() / 255


def _against(rulers: Rulers, other: Alit, images: Tensor) -> np.ndarray:
    common = rulers.common_lengths
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


class Reject(NamedTuple):
    """An image that could not be decoded."""

    id: str
    reason: str
    message: str


class Part(NamedTuple):
    """A batch after measuring: `measured` of the images that could be decoded, None where none could."""

    number: int
    """Its place among all batches."""
    measured: Measured | None
    rejects: list[Reject]


class Collected:
    """All parts, whatever the order they come in; one that comes again, from a retried task, counts once.

    Attributes:
        moments: of the features, as on their axis K + 2; empty where there are none.
    """

    def __init__(self) -> None:
        self._parts: dict[int, Part] = {}
        self._waiting: list[np.ndarray] = []
        self.moments: list[Moments] = []

    def add(self, part: Part) -> None:
        """Takes one part."""
        if part.number in self._parts:
            return
        if part.measured is not None and part.measured.features.size:
            self._waiting.append(part.measured.features)
            if sum(map(len, self._waiting)) >= WAITING:
                self._count()
            part = part._replace(measured=part.measured._replace(features=np.zeros((0, 0, 0), np.float32)))
        self._parts[part.number] = part

    @property
    def through(self) -> int:
        """Images that are done, rejects included."""
        return sum((0 if p.measured is None else len(p.measured.l1)) + len(p.rejects) for p in self._parts.values())

    @property
    def rejects(self) -> list[Reject]:
        """In the input's order."""
        return [reject for number in sorted(self._parts) for reject in self._parts[number].rejects]

    def measured(self) -> Measured:
        """Of all images, in the input's order, without their features, which are in the moments.

        Raises:
            AlitError: there are none.
        """
        self._count()
        ordered = [self._parts[number].measured for number in sorted(self._parts)]
        found = [measured for measured in ordered if measured is not None]
        if not found:
            rejects = self.rejects
            example = f", such as {rejects[0].id!r}: {rejects[0].message}" if rejects else ""
            raise AlitError(f"there is nothing to measure: {len(rejects)} images could not be decoded{example}")
        return Measured(*(np.concatenate(columns) for columns in zip(*found, strict=True)))

    def _count(self) -> None:
        if not self._waiting:
            return
        features = np.concatenate(self._waiting)
        self._waiting = []
        self.moments = self.moments or [Moments(features.shape[2]) for _ in range(features.shape[1])]
        for index, moments in enumerate(self.moments):
            moments.add(torch.from_numpy(np.ascontiguousarray(features[:, index])))
