"""The data of the page: facts about a token dataset, and the images to show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from alit.encoding.criteria import criterion_name

CRITERION_DESCRIPTIONS = {
    "l1": "mean absolute error of the pixels",
    "mse": "mean squared error of the pixels",
    "psnr": "peak signal-to-noise ratio in decibels",
    "ssim": "structural similarity",
    "code": "share of wrongly predicted base tokens",
    "latent": "error of the base latents",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GalleryImage:
    """One tokenized image with its reconstruction from every length.

    Attributes:
        id: The image's id in the dataset; any text.
        original: The image at the model's size, encoded as PNG, WebP or JPEG.
        reconstructions: One encoded image per length, shortest first.
        lengths: The number of tokens of each reconstruction, increasing.
        scores: The criterion's value at each length, in its natural unit; empty where there is none (`fixed`).
            None, NaN and infinities are labelled as such and left out of the curve.
        chosen: Index of the chosen length in `lengths`.
        satisfied: Whether the threshold was met.
        width: Width of the source file, in pixels.
        height: Height of the source file, in pixels.
    """

    id: str
    original: bytes
    reconstructions: tuple[bytes, ...]
    lengths: tuple[int, ...]
    scores: tuple[float | None, ...] = ()
    chosen: int
    satisfied: bool
    width: int
    height: int

    def __post_init__(self) -> None:
        count = len(self.lengths)
        if not count or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths must increase and be at least one, got {self.lengths}")
        if len(self.reconstructions) != count or len(self.scores) not in (0, count):
            raise ValueError(
                f"{count} lengths need as many reconstructions and scores (or no scores), got "
                f"{len(self.reconstructions)} and {len(self.scores)}"
            )
        if not 0 <= self.chosen < count:
            raise ValueError(f"chosen must be an index into {count} lengths, got {self.chosen}")

    @property
    def tokens(self) -> int:
        """The chosen length."""
        return self.lengths[self.chosen]

    def score(self, index: int) -> float | None:
        """Returns the score at the length with that index, finite or infinite; None where there is none."""
        value = self.scores[index] if self.scores else None
        return None if value is None or math.isnan(value) else float(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSummary:
    """Facts about the whole dataset, for the head of the page.

    Attributes:
        title: The page's heading.
        criterion: The criterion as written on the command line, such as `l1:0.05`.
        higher_is_better: Whether scores satisfy at or above the threshold instead of at or below it.
        threshold: The criterion's threshold; None or NaN for `fixed`, which has none.
        images: Number of tokenized images.
        rejects: Number of images that could not be tokenized.
        mean_tokens: Mean number of tokens per image.
        histogram: Number of images by number of tokens.
        bits_per_token: Base-2 logarithm of the codebook's size.
        images_per_second: Throughput of the run; NaN where unknown.
        fingerprint: Fingerprint of the model's weights.
        dataset: Path or URI of the dataset.
        facts: Further lines, value by label.
    """

    title: str
    criterion: str
    higher_is_better: bool
    threshold: float | None
    images: int
    rejects: int
    mean_tokens: float
    histogram: Mapping[int, int]
    bits_per_token: float
    images_per_second: float
    fingerprint: str
    dataset: str
    facts: Mapping[str, str]

    @property
    def limit(self) -> float | None:
        """The threshold, None for a criterion without one (whose threshold may be NaN)."""
        return None if self.threshold is None or math.isnan(self.threshold) else self.threshold

    @property
    def measure(self) -> str:
        """The criterion's name without its threshold."""
        return criterion_name(self.criterion)
