"""What the page shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from alit.encoding.criteria import criterion_name

_MEASURES = {
    "l1": "mean absolute error of the pixels",
    "mse": "mean squared error of the pixels",
    "psnr": "peak signal-to-noise ratio in decibels",
    "ssim": "structural similarity",
    "code": "share of wrongly predicted base tokens",
    "latent": "error of the base latents",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One tokenized photograph.

    Attributes:
        id: its name in the dataset; any text.
        original: the photograph at the model's size, encoded (PNG, WebP or JPEG).
        reconstructions: what each length decodes to, encoded, shortest first.
        lengths: tokens of each reconstruction, increasing.
        scores: the criterion's value at each length, in its natural unit; empty where there is none (`fixed`).
            None, NaN and infinities are shown as such and left out of the curve.
        chosen: index into `lengths`.
        satisfied: whether the threshold was met.
        width: of the source file, in pixels.
        height: of the source file, in pixels.
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

    def score(self, index: int) -> float | None:
        """The finite or infinite score at that length, or None."""
        value = self.scores[index] if self.scores else None
        return None if value is None or math.isnan(value) else float(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What the head of the page says about the whole dataset.

    Attributes:
        title: the page's headline.
        criterion: how it is written, such as `l1:0.05`.
        higher_is_better: whether scores satisfy at or above the threshold instead of at or below it.
        threshold: None for `fixed`.
        images: how many were tokenized.
        rejects: how many could not be.
        mean_tokens: tokens per image.
        histogram: tokens per image -> how many images.
        bits_per_token: base-2 logarithm of the codebook's size.
        images_per_second: of the run.
        fingerprint: of the model's weights.
        dataset: where the dataset lies.
        facts: further lines, label -> value.
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
        """The threshold, None where there is none; `alit.selection` writes NaN there."""
        return None if self.threshold is None or math.isnan(self.threshold) else self.threshold

    @property
    def measure(self) -> str:
        """The criterion's name without its threshold."""
        return criterion_name(self.criterion)
