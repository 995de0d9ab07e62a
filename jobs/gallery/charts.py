"""Geometry of the page's charts; `charts.html.jinja` draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from jobs.gallery.contents import DatasetSummary, GalleryImage


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The drawing area and its margins, in pixels; the plot extends to the right edge."""

    width: int
    height: int
    left: int
    top: int
    bottom: int

    @property
    def plot_width(self) -> int:
        """Width inside the margins."""
        return self.width - self.left

    @property
    def plot_height(self) -> int:
        """Height inside the margins."""
        return self.height - self.top - self.bottom

    @property
    def baseline(self) -> int:
        """The y coordinate of the plot's lower edge."""
        return self.top + self.plot_height

    @property
    def center(self) -> float:
        """The x coordinate of the plot's middle."""
        return (self.left + self.width) / 2


HISTOGRAM_FRAME = Frame(width=420, height=220, left=46, top=22, bottom=44)
CURVE_FRAME = Frame(width=260, height=260, left=42, top=20, bottom=38)


class Tick(NamedTuple):
    """A labelled position on an axis."""

    position: float
    label: str


class Bar(NamedTuple):
    """A bar of the histogram."""

    length: int
    images: int
    center: float
    """The x coordinate of its middle."""
    top: float
    """The y coordinate at which its exact height ends."""
    width: float
    height: float
    """At least 1 pixel where the count is not 0."""
    labelled: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Images by number of tokens.

    Attributes:
        counts: Number of images by length, shortest first.
        total: Number of images; there are no ticks and bars when it is 0.
        ticks: Horizontal grid lines.
        bars: One per length.
    """

    counts: dict[int, int]
    total: int
    ticks: list[Tick]
    bars: list[Bar]
    frame: Frame = HISTOGRAM_FRAME


class Threshold(NamedTuple):
    """The criterion's threshold as a line, and the satisfying side of it as a band."""

    y: float
    band_top: float
    band_height: float
    value: float
    at_end: bool
    """Whether the label stands at the right end of the line."""
    label_y: float


class Point(NamedTuple):
    """A score of the curve."""

    x: float
    y: float
    length: int
    score: float
    chosen: bool
    label_y: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreCurve:
    """Score over tokens of one image.

    Attributes:
        x_ticks: Labels below the plot.
        y_ticks: Horizontal grid lines.
        threshold: None for a criterion without one.
        segments: Pairs of points to join.
        points: The finite scores.
    """

    x_ticks: list[Tick]
    y_ticks: list[Tick]
    threshold: Threshold | None
    segments: list[tuple[Point, Point]]
    points: list[Point]
    frame: Frame = CURVE_FRAME


def round_numbers(low: float, high: float, limit: int) -> list[float]:
    """Returns at most `limit` + 1 evenly spaced round numbers from `low` to `high`, which must differ."""
    rough = (high - low) / limit
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def histogram_chart(summary: DatasetSummary, lengths: Sequence[int]) -> Histogram:
    """Lays out the histogram of the dataset over the given lengths, which increase."""
    counts = {n: summary.histogram.get(n, 0) for n in lengths}
    peak, total = max(counts.values(), default=0), sum(counts.values())
    if not total:
        return Histogram(counts=counts, total=0, ticks=[], bars=[])
    frame = HISTOGRAM_FRAME
    step = frame.plot_width / len(counts)
    labelled_every = math.ceil(len(counts) / 10)  # where bars are crowded, several share a label
    ticks = [
        Tick(frame.top + frame.plot_height * (1 - value / peak), f"{int(value):,}")
        for value in round_numbers(0, peak, 5)
        if value == int(value)
    ]
    bars = []
    for i, (length, count) in enumerate(counts.items()):
        height = frame.plot_height * count / peak
        bar = Bar(
            length=length,
            images=count,
            center=frame.left + step * (i + 0.5),
            top=frame.baseline - height,
            width=min(step * 0.62, 56),
            height=max(height, 1 if count else 0),
            labelled=i % labelled_every == 0,
        )
        bars.append(bar)
    return Histogram(counts=counts, total=total, ticks=ticks, bars=bars)


def score_curve(summary: DatasetSummary, image: GalleryImage) -> ScoreCurve | None:
    """Lays out an image's score over tokens; None where no score is finite."""
    scores = [(k, image.score(k)) for k in range(len(image.lengths))]
    finite = [(k, score) for k, score in scores if score is not None and math.isfinite(score)]
    if not finite:
        return None
    frame, limit = CURVE_FRAME, summary.limit
    values = [score for _, score in finite] + ([] if limit is None else [limit])
    margin = (max(values) - min(values)) * 0.12 or abs(values[0]) * 0.1 or 1.0
    low, high = min(values) - margin, max(values) + margin
    first, last = image.lengths[0], image.lengths[-1]

    def x_of(length: int) -> float:
        share = (length - first) / (last - first) if last > first else 0.5
        return frame.left + frame.plot_width * (0.06 + 0.76 * share)

    def y_of(score: float) -> float:
        return frame.top + frame.plot_height * (1 - (score - low) / (high - low))

    label_offset = 22 if summary.higher_is_better else -13  # on the side away from the curve
    points = {
        k: Point(
            x=x_of(image.lengths[k]),
            y=y_of(score),
            length=image.lengths[k],
            score=score,
            chosen=k == image.chosen,
            label_y=y_of(score) + label_offset,
        )
        for k, score in finite
    }
    return ScoreCurve(
        x_ticks=[Tick(x_of(n), str(n)) for n in image.lengths[:: math.ceil(len(image.lengths) / 6)]],
        y_ticks=[Tick(y_of(value), f"{value:.4g}") for value in round_numbers(low, high, 5)],
        threshold=None if limit is None else _threshold(summary, image, limit, y_of(limit), x_of(image.tokens)),
        # a length without a score breaks the line: only neighbouring lengths are joined
        segments=[(points[a], points[b]) for a, b in pairwise(points) if b == a + 1],
        points=list(points.values()),
    )


def _threshold(summary: DatasetSummary, image: GalleryImage, limit: float, y: float, chosen_x: float) -> Threshold:
    """Places the label where the curve is not: before it, or behind it once it has crossed the threshold."""
    frame, upward = CURVE_FRAME, summary.higher_is_better
    at_end = image.satisfied and chosen_x < frame.left + frame.plot_width / 2
    return Threshold(
        y=y,
        band_top=frame.top if upward else y,
        band_height=y - frame.top if upward else frame.baseline - y,
        value=limit,
        at_end=at_end,
        label_y=y + (-6 if upward != at_end else 14),
    )
