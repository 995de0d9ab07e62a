"""The models of an evaluation: the weights, their opponent, LPIPS and Inception."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from alit.errors import AlitError
from alit.metrics.fid import InceptionFeatures
from alit.metrics.lpips import SMALLEST_SIDE, Perceptual
from alit.tokenizer import Alit
from jobs.runtime.weights import load


@dataclass(frozen=True, kw_only=True, slots=True)
class RulerFiles:
    """What an evaluation loads; picklable.

    Attributes:
        weights: the weights folder to evaluate.
        against: another one, for a paired comparison.
        vgg, lpips: the files of `Perceptual`.
        inception: the file of `InceptionFeatures`.
    """

    weights: str | None = None
    against: str | None = None
    vgg: str | None = None
    lpips: str | None = None
    inception: str | None = None

    def __post_init__(self) -> None:
        if (self.vgg is None) != (self.lpips is None):
            given, missing = ("--vgg", "--lpips") if self.lpips is None else ("--lpips", "--vgg")
            raise AlitError(f"LPIPS needs two files, VGG16's and its heads': {given} is given, {missing} is missing")

    def absolute(self) -> RulerFiles:
        """The same files by names that hold in any working folder."""
        found = {
            name: path and (path if "://" in path else str(Path(path).resolve())) for name, path in asdict(self).items()
        }
        return RulerFiles(**found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rulers:
    """The model to evaluate and all that it is measured with."""

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
                f"--against names weights for images of {self.against.config.image_size} pixels, the evaluated ones "
                f"take {size}; their errors have nothing in common"
            )
        if self.perceptual is not None and size < SMALLEST_SIDE:
            raise AlitError(f"LPIPS needs images of at least {SMALLEST_SIDE} pixels, these weights take {size}")

    @classmethod
    def load(cls, files: RulerFiles, device: str = "cpu") -> Rulers:
        """Reads all files.

        Raises:
            AlitError: one of them cannot be used, or the two weights have no image size in common.
        """
        weights = load(files.weights)
        against = load(files.against) if files.against is not None else None
        assert (files.vgg is None) == (files.lpips is None)
        perceptual = Perceptual.from_files(files.vgg, files.lpips) if files.vgg and files.lpips else None
        inception = InceptionFeatures.from_file(files.inception) if files.inception else None
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
        """The token counts that both models can give."""
        others = () if self.against is None else self.against.config.lengths
        return tuple(length for length in self.model.config.lengths if length in others)
