"""Options of `alit evaluate`, without torch or Ray, so that help answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from alit.errors import AlitError
from alit.validation import require, require_range


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationPaths:
    """The files that an evaluation loads; picklable.

    Attributes:
        weights: A weights folder; the packaged one when not given.
        against: Another weights folder, for a paired comparison on the same images.
        vgg: torchvision's VGG16 file (vgg16-397923af.pth); with --lpips, LPIPS is measured.
        lpips: The VGG heads of LPIPS v0.1 (lpips/weights/v0.1/vgg.pth).
        inception: pytorch-fid's Inception file (pt_inception-2015-12-05-6726825d.pth); with it, rFID is measured.
    """

    weights: str | None = None
    against: str | None = None
    vgg: str | None = None
    lpips: str | None = None
    inception: str | None = None

    def __post_init__(self) -> None:
        if (self.vgg is None) != (self.lpips is None):
            present, missing = ("--vgg", "--lpips") if self.lpips is None else ("--lpips", "--vgg")
            raise AlitError(f"LPIPS needs two files, VGG16 and its heads: {present} is given, {missing} is missing")

    def absolute(self) -> EvaluationPaths:
        """Returns the same files by names that hold in any working directory."""

        def resolve(path: str | None) -> str | None:
            return path if path is None or "://" in path else str(Path(path).resolve())

        return replace(
            self,
            weights=resolve(self.weights),
            against=resolve(self.against),
            vgg=resolve(self.vgg),
            lpips=resolve(self.lpips),
            inception=resolve(self.inception),
        )


DEFAULT_PATHS = EvaluationPaths()


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """Everything but INPUT and OUTPUT.

    Attributes:
        paths: The models to load.
        thresholds: Thresholds of the criterion l1; when not given, some that spread the lengths.
        workers: Number of processes that hold the models; one per CPU, or per GPU where there is one.
        limit: Maximum number of images, spread evenly over the input.
        image_column: As for tokenize.
        ray: Measure in worker processes; --no-ray measures in this process, for debugging.
    """

    paths: Annotated[EvaluationPaths, arg(name="")] = DEFAULT_PATHS
    thresholds: tuple[float, ...] = ()
    workers: int | None = None
    limit: Annotated[int | None, arg(name="most")] = None
    image_column: str = "image"
    ray: bool = True

    def __post_init__(self) -> None:
        require_range("--workers", self.workers, 1)
        require_range("--most", self.limit, 1)
        require_thresholds(self.thresholds)


def require_thresholds(thresholds: Sequence[float]) -> None:
    """Checks that all thresholds are positive and finite.

    Raises:
        AlitError: One of them is not.
    """
    for threshold in thresholds:
        require(
            0 < threshold < float("inf"),
            f"--thresholds must be positive numbers, such as 0.1, got {threshold:g}",
        )
