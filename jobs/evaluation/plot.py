"""Plots of rate and distortion."""

from __future__ import annotations

import io
import math
from typing import Any, Literal, NamedTuple

from jobs.evaluation.results import Evaluation

INK, GRID = "#333333", "#dddddd"
FIXED, ADAPTIVE, BASE = "#1f6fb4", "#d1495b", "#555555"
CODEC_STYLES = {"jpeg": ("JPEG", "#e09f3e", "s"), "webp": ("WebP", "#3a8f5c", "D")}


class _Point(NamedTuple):
    rate: float
    psnr: float
    l1: float


class _Curve(NamedTuple):
    label: str
    points: list[_Point]
    style: dict[str, Any]


def draw(result: Evaluation, kind: Literal["png", "svg"]) -> bytes:
    """Plots PSNR and L1 over bits per pixel, or over tokens where these are continuous.

    Returns:
        An image file, the same for the same evaluation.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, which keeps figures alive and looks for a display

    curves = _curves(result)
    settings: Any = {"svg.hashsalt": result.fingerprint, "svg.fonttype": "none", "font.size": 10, "text.color": INK}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(11, 4.6), dpi=150)
        panels = figure.subplots(1, 2)
        titles = {"psnr": "PSNR in dB, higher is better", "l1": "L1, lower is better"}
        for axes, (measure, title) in zip(panels, titles.items(), strict=True):
            _panel(axes, result, curves, measure)
            axes.set_title(title, loc="left", fontsize=11, color=INK)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, labelcolor=INK)
        size = f"{result.images} images of {result.image_size} x {result.image_size} pixels"
        figure.suptitle(f"{size}, weights {result.fingerprint[:12]}", fontsize=10, color=INK)
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
        file = io.BytesIO()
        # without a date, so that equal evaluations give equal files
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(file, format=kind, metadata=metadata, facecolor="white")
    return file.getvalue()


def _curves(result: Evaluation) -> list[_Curve]:
    """Returns the curves of fixed lengths, adaptive lengths and codecs, whose equal points are drawn once."""

    def rate(bits: float | None, tokens: float) -> float:
        return tokens if bits is None else bits

    fixed = [_Point(rate(c.bits_per_pixel, c.tokens), c.quality.psnr, c.quality.l1) for c in result.lengths]
    chosen = [_Point(rate(a.bits_per_pixel, a.mean_tokens), a.psnr, a.l1) for a in result.adaptive]
    curves = [
        _Curve("one length for all", fixed, {"color": FIXED, "marker": "o", "markersize": 6, "zorder": 3}),
        _Curve("adaptive, by l1", sorted(chosen), {"color": ADAPTIVE, "marker": "^", "markersize": 6, "zorder": 4}),
    ]
    for codec in result.codecs:
        name, color, marker = CODEC_STYLES[codec.name]
        points = sorted({_Point(p.bits_per_pixel, p.psnr, p.l1) for p in codec.points})
        saturated = all(p.token_bytes < codec.smallest_bytes for p in codec.points)
        label = f"{name}, smallest files" if saturated else name
        curves.append(_Curve(label, points, {"color": color, "marker": marker, "markersize": 6}))
    return curves


def _panel(axes: Any, result: Evaluation, curves: list[_Curve], measure: str) -> None:
    """Draws one measure, `psnr` or `l1`, of all curves."""
    for curve in curves:
        rates, values = [p.rate for p in curve.points], [getattr(p, measure) for p in curve.points]
        axes.plot(rates, values, label=curve.label, linewidth=1.6, **curve.style)
    below = measure == "psnr"  # the side of the curve that has room for labels
    for code, point in zip(result.lengths, curves[0].points, strict=True):
        offset = {"xytext": (5, -5 if below else 4), "textcoords": "offset points", "va": "top" if below else "bottom"}
        position = (point.rate, getattr(point, measure))
        axes.annotate(str(code.tokens), position, fontsize=8, color=FIXED, ha="left", **offset)
    base = getattr(result.base.quality, measure)
    axes.axhline(base, color=BASE, linestyle=":", linewidth=1.4, zorder=1)
    rates = [point.rate for curve in curves for point in curve.points]
    own = result.base.bits_per_pixel if result.lengths[0].bits_per_pixel is not None else None
    star = {"color": BASE, "marker": "" if own is None else "*", "markersize": 10}
    axes.plot([], [], label="base tokenizer", linestyle=":", **star)
    if own is not None:
        axes.plot([own], [base], linestyle="", zorder=2, **star)
        rates.append(own)
    _rate_axis(axes, min(rates) / 1.25, max(rates) * 1.25)
    unit = "tokens per image" if result.lengths[0].bits_per_pixel is None else "bits per pixel, logarithmic"
    axes.set_xlabel(unit, color=INK)
    axes.margins(y=0.12)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def _rate_axis(axes: Any, low: float, high: float) -> None:
    """Makes the horizontal axis logarithmic from low to high, with ticks at 1, 2 and 5 times powers of 10."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(low, high)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**exponent for exponent in exponents for m in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
