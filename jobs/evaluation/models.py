"""The models of an evaluation: the weights, those they are compared with, LPIPS and Inception."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alit.errors import AlitError
from alit.metrics.fid import InceptionFeatures
from alit.metrics.lpips import SMALLEST_SIDE, Perceptual
from alit.tokenizer import Alit
from jobs.evaluation.options import EvaluationPaths
from jobs.runtime.weights import load


def local_device() -> str:
    """Returns the device on which this process measures."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationModels:
    """The model to evaluate and the models that measure it.

    Attributes:
        model: The model to evaluate.
        fingerprint: The fingerprint of its weights.
        against: Another model of the same image size, for a paired comparison.
        against_fingerprint: The fingerprint of its weights.
        perceptual: LPIPS; not measured when None.
        inception: Features for rFID; not measured when None.
    """

    model: Alit
    fingerprint: str = ""
    against: Alit | None = None
    against_fingerprint: str = ""
    perceptual: Perceptual | None = None
    inception: InceptionFeatures | None = None

    def __post_init__(self) -> None:
        size = self.model.config.image_size
        if self.against is not None and self.against.config.image_size != size:
            raise AlitError(
                f"--against names weights for images of {self.against.config.image_size} pixels, but the evaluated "
                f"weights take {size}; their errors cannot be compared"
            )
        if self.perceptual is not None and size < SMALLEST_SIDE:
            raise AlitError(f"LPIPS needs images of at least {SMALLEST_SIDE} pixels, these weights take {size}")

    @classmethod
    def load(cls, paths: EvaluationPaths, device: str = "cpu") -> EvaluationModels:
        """Reads all files and moves the models to a device.

        Raises:
            AlitError: A file cannot be used, or the two weights have different image sizes.
        """
        weights = load(paths.weights)
        against = load(paths.against) if paths.against is not None else None
        perceptual = Perceptual.from_files(paths.vgg, paths.lpips) if paths.vgg and paths.lpips else None
        inception = InceptionFeatures.from_file(paths.inception) if paths.inception else None
        return cls(
            model=weights.model.to(device),
            fingerprint=weights.fingerprint,
            against=None if against is None else against.model.to(device),
            against_fingerprint="" if against is None else against.fingerprint,
            perceptual=None if perceptual is None else perceptual.to(device),
            inception=None if inception is None else inception.to(device),
        )

    @property
    def common_lengths(self) -> tuple[int, ...]:
        """The lengths that both models have."""
        others = () if self.against is None else self.against.config.lengths
        return tuple(length for length in self.model.config.lengths if length in others)
