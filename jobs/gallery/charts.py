"""The charts of the page, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from jobs.gallery.contents import Picture, Summary
from jobs.gallery.markup import _number, _plural, _text


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers from low to high, which must differ."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _histogram(summary: Summary, lengths: Sequence[int]) -> str:
    counts = {n: summary.histogram.get(n, 0) for n in lengths}
    peak, total = max(counts.values(), default=0), sum(counts.values())
    if not total:
        return '<div class="histogram">\n<h2>Tokens per photograph</h2>\n<p>No photograph was tokenized.</p>\n</div>'
    width, height, left, top, bottom = 420, 220, 46, 22, 44
    plot, step = height - top - bottom, (width - left) / len(counts)
    every = math.ceil(len(counts) / 10)  # how many bars share a label where they are crowded
    parts = []
    for tick in _ticks(0, peak, 5):
        if tick == int(tick):
            y = top + plot * (1 - tick / peak)
            parts.append(f'<line class="grid" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{int(tick):,}</text>')
    for i, (length, count) in enumerate(counts.items()):
        x, tall = left + step * (i + 0.5), plot * count / peak
        bar = min(step * 0.62, 56)
        parts.append(
            f'<rect class="bar" x="{x - bar / 2:.1f}" y="{top + plot - tall:.1f}" width="{bar:.1f}" '
            f'height="{max(tall, count and 1):.1f}" rx="2"/>'
        )
        if i % every == 0:
            y = top + plot
            parts.append(
                f'<text class="strong" x="{x:.1f}" y="{y - tall - 6:.1f}" text-anchor="middle">{count:,}</text>'
            )
            parts.append(f'<text x="{x:.1f}" y="{y + 17}" text-anchor="middle">{length}</text>')
    parts.append(f'<text x="{(left + width) / 2:.0f}" y="{height - 4}" text-anchor="middle">tokens</text>')
    parts.append('<text x="0" y="10">photographs</text>')
    told = "; ".join(f"{n} tokens: {_plural(c, 'photograph')}" for n, c in counts.items())
    rows = "".join(f"<tr><td>{n}</td><td>{c:,}</td><td>{c / total:.1%}</td></tr>" for n, c in counts.items())
    return f"""<div class="histogram">
<h2>Tokens per photograph</h2>
<svg viewBox="0 0 {width} {height}" role="img" font-size="12" aria-labelledby="histogram-title histogram-text">
<title id="histogram-title">How many photographs took how many tokens</title>
<desc id="histogram-text">{told}</desc>
{"".join(parts)}
</svg>
<details><summary>As a table</summary>
<table><thead><tr><th scope="col">tokens</th><th scope="col">photographs</th><th scope="col">share</th></tr></thead>
<tbody>{rows}</tbody></table></details>
</div>"""


def _ranks(summary: Summary, pictures: Sequence[Picture]) -> dict[str, list[int]]:
    """For each way to sort, the place of every picture; ties keep the given order."""

    def places(keys: Iterable[Any]) -> list[int]:
        keyed = list(keys)
        order = sorted(range(len(keyed)), key=lambda i: (keyed[i], i))
        return [place for _, place in sorted((i, place) for place, i in enumerate(order))]

    tokens = [p.lengths[p.chosen] for p in pictures]
    ranks = {
        "shown": list(range(len(pictures))),
        "id": places(p.id for p in pictures),
        "fewest": places(tokens),
        "most": places(-n for n in tokens),
    }
    scores = [p.score(p.chosen) for p in pictures]
    if any(score is not None for score in scores):
        sign = -1 if summary.higher_is_better else 1
        ranks["score"] = places((s is None, sign * (0.0 if s is None else s)) for s in scores)
    return ranks


def _curve(summary: Summary, index: int, picture: Picture) -> str:
    """Score over tokens; nothing where no score is finite."""
    scores = [picture.score(k) for k in range(len(picture.lengths))]
    points = [(k, s) for k, s in enumerate(scores) if s is not None and math.isfinite(s)]
    if not points:
        return ""
    limit, values = summary.limit, [s for _, s in points]
    shown = values if limit is None else [*values, limit]
    margin = (max(shown) - min(shown)) * 0.12 or abs(shown[0]) * 0.1 or 1.0
    low, high = min(shown) - margin, max(shown) + margin
    width, height, left, top, bottom = 260, 260, 42, 20, 38
    inner, plot, first, last = width - left, height - top - bottom, picture.lengths[0], picture.lengths[-1]

    def x_of(length: int) -> float:
        return left + inner * (0.06 + 0.76 * ((length - first) / (last - first) if last > first else 0.5))

    def y_of(score: float) -> float:
        return top + plot * (1 - (score - low) / (high - low))

    parts = []
    for tick in _ticks(low, high, 5):
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    every = math.ceil(len(picture.lengths) / 6)
    for length in picture.lengths[::every]:
        parts.append(f'<text x="{x_of(length):.1f}" y="{top + plot + 17}" text-anchor="middle">{length}</text>')
    if limit is not None:
        y, up = y_of(limit), summary.higher_is_better
        begin, tall = (top, y - top) if up else (y, top + plot - y)
        # its label stands where the curve is not: beside it, or behind it once it has crossed
        behind = picture.satisfied and x_of(picture.lengths[picture.chosen]) < left + inner / 2
        where = f'x="{width - 4}" text-anchor="end"' if behind else f'x="{left + 4}"'
        parts.append(
            f'<rect class="reached" x="{left}" y="{begin:.1f}" width="{inner}" height="{tall:.1f}"/>'
            f'<line class="threshold" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="accent" {where} y="{y + (-6 if up != behind else 14):.1f}">threshold {limit:g}</text>'
        )
    # a length without a score breaks the line: only neighbours are joined
    for (k, a), (following, b) in pairwise(points):
        if following == k + 1:
            ends = (x_of(picture.lengths[k]), y_of(a), x_of(picture.lengths[following]), y_of(b))
            parts.append('<line class="curve" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'.format(*ends))
    for k, score in points:
        x, y = x_of(picture.lengths[k]), y_of(score)
        if k == picture.chosen:
            down = 22 if summary.higher_is_better else -13  # where the curve is not
            parts.append(
                f'<circle class="pick" cx="{x:.1f}" cy="{y:.1f}" r="7"/>'
                f'<text class="strong" x="{x - 3:.1f}" y="{y + down:.1f}">{_number(score)}</text>'
            )
        parts.append(f'<circle class="dot" data-view="{picture.lengths[k]}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    told = "; ".join(f"{n} tokens: {_number(s)}" for n, s in zip(picture.lengths, scores, strict=True))
    return f"""<figure class="score">
<svg viewBox="0 0 {width} {height}" role="img" font-size="12" aria-labelledby="curve-{index} points-{index}">
<title id="curve-{index}">{_text(summary.measure)} over tokens</title>
<desc id="points-{index}">{told}. Chosen: {picture.lengths[picture.chosen]} tokens.</desc>
{"".join(parts)}
<text x="{left + inner / 2:.0f}" y="{height - 3}" text-anchor="middle">tokens</text>
<text x="0" y="10">{_text(summary.measure)}</text>
</svg>
</figure>
"""
