"""One web page that shows what the tokenizer made of some photographs.

The page is a single string: styles (`page.css`), script (`page.js`) and pictures lie inside it, and its content
security policy forbids it to fetch anything. It reads without the script; only flipping and sorting need it.
"""

from __future__ import annotations

import hashlib
import math
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import pairwise
from typing import Any

_SIGNATURES = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "image/webp"),
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
)
# what HTML cannot hold: lone surrogates, control characters other than tab and newline
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
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
        return self.criterion.partition(":")[0]


def render(summary: Summary, pictures: Sequence[Picture], rejects: Sequence[tuple[str, str, str]] = ()) -> str:
    """The page, a function of its arguments alone.

    Args:
        summary: facts about the whole dataset.
        pictures: those to show, in this order.
        rejects: (id, reason, message) of images that could not be tokenized.

    Raises:
        ValueError: a picture's bytes are neither PNG, WebP nor JPEG.
    """
    files = resources.files("jobs")
    style, script = (files.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    script_hash = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    lengths = sorted({*summary.histogram, *(n for p in pictures for n in p.lengths)})
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{script_hash}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{_text(summary.title)}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{_text(summary.title)}</h1>
<p class="lead">{_lead(summary, lengths)}</p>
{_figures(summary)}
</header>
<section class="overview">
{_histogram(summary, lengths)}
{_facts(summary)}
</section>
{_gallery(summary, pictures)}
{_rejects(summary, rejects)}
<script>{script}</script>
</body>
</html>
"""


def _text(value: object) -> str:
    return escape(_UNPRINTABLE.sub("\ufffd", str(value)))


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or math.isnan(value):
        return "no score"
    if math.isinf(value):
        return "∞" if value > 0 else "\u2212∞"
    text = f"{value:#.{digits}g}".rstrip(".")
    return text.replace("-", "\u2212", 1) if value < 0 else text


def _quantity(value: float, digits: int = 1) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else "\u2013"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _data_uri(image: bytes) -> str:
    for signature, mime in _SIGNATURES:
        if signature.match(image):
            return f"data:{mime};base64,{b64encode(image).decode()}"
    raise ValueError(f"a picture must be PNG, WebP or JPEG, got bytes that begin {image[:12]!r}")


def _lead(summary: Summary, lengths: Sequence[int]) -> str:
    span = f" ({lengths[0]} to {lengths[-1]})" if len(lengths) > 1 else ""
    if summary.limit is None:
        return (
            f"A tokenizer wrote every photograph as a short row of tokens, of the same length for all "
            f"(<code>{_text(summary.criterion)}</code>), and a decoder drew it again from those alone."
        )
    measure = _MEASURES.get(summary.measure, f"error <code>{_text(summary.measure)}</code>")
    verb = "reached at least" if summary.higher_is_better else "was at most"
    return (
        f"A tokenizer wrote each photograph as a short row of tokens, as many as it needed{span}: it added tokens "
        f"until the {measure} {verb} {summary.limit:g}. Plain pictures need few, busy ones need many."
    )


def _figures(summary: Summary) -> str:
    mean_bytes = summary.mean_tokens * summary.bits_per_token / 8
    rows = {
        "photographs": f"{summary.images:,}",
        "tokens each, on average": _quantity(summary.mean_tokens),
        "bytes each, on average": _quantity(mean_bytes),
        "photographs a second": _quantity(summary.images_per_second),
        "rejected files": f"{summary.rejects:,}",
    }
    return f'<dl class="figures">{_definitions(rows)}</dl>'


def _definitions(rows: Mapping[str, str]) -> str:
    return "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in rows.items())


def _facts(summary: Summary) -> str:
    rows = {
        "criterion": summary.criterion,
        "bits per token": _quantity(summary.bits_per_token, 2),
        "model": summary.fingerprint,
        "dataset": summary.dataset,
        **summary.facts,
    }
    lines = "\n".join(f"<dt>{_text(label)}</dt><dd>{_text(value)}</dd>" for label, value in rows.items())
    return f'<div>\n<h2>The run</h2>\n<dl class="facts">\n{lines}\n</dl>\n</div>'


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


def _gallery(summary: Summary, pictures: Sequence[Picture]) -> str:
    if not pictures:
        return '<main>\n<h2>Photographs</h2>\n<p class="soft">None was kept for this page.</p>\n</main>'
    ranks = _ranks(summary, pictures)
    cards = "\n".join(_card(summary, i, p, {k: r[i] for k, r in ranks.items()}) for i, p in enumerate(pictures))
    views = "".join(
        f'<option value="{n}">{n} tokens</option>' for n in sorted({n for p in pictures for n in p.lengths})
    )
    sorts = {"shown": "as given", "id": "name", "fewest": "fewest tokens", "most": "most tokens"}
    if "score" in ranks:
        sorts["score"] = "best score"
    options = "".join(f'<option value="{key}">{label}</option>' for key, label in sorts.items())
    better = "higher is better" if summary.higher_is_better else "lower is better"
    scores = f" and the score, {_text(summary.measure)} ({better})" if "score" in ranks else ""
    return f"""<main>
<div class="heading">
<div><h2>Photographs</h2>
<p class="soft">{len(pictures):,} of {summary.images:,}, each drawn again from every number of tokens. Under each \
stand the tokens{scores}; the framed one was chosen.</p></div>
<div class="tools" hidden>
<label>Show <select id="view" autocomplete="off"><option value="original">originals</option>\
<option value="chosen">chosen lengths</option>{views}</select></label>
<label>Sort by <select id="sort" autocomplete="off">{options}</select></label>
</div>
</div>
<div class="gallery">
{cards}
</div>
</main>"""


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


def _card(summary: Summary, index: int, picture: Picture, ranks: Mapping[str, int]) -> str:
    name, chosen = _text(picture.id), picture.chosen
    badge = ""
    if summary.limit is not None and not picture.satisfied:
        badge = ' <span class="badge">threshold not met</span>'
    original = f'<img src="{_data_uri(picture.original)}" alt="{name}, the original">'
    cells = [
        f'<label class="cell"><input type="radio" name="view-{index}" value="original" data-caption="original" '
        f'aria-label="original" autocomplete="off" checked>{original}<b>original</b></label>'
    ]
    for k, (length, image) in enumerate(zip(picture.lengths, picture.reconstructions, strict=True)):
        says, score = f"{length} tokens", ""
        if picture.scores:
            score = f"<span>{_number(picture.score(k))}</span>"
            says += f", {_text(summary.measure)} {_number(picture.score(k))}"
        says += ", chosen" if k == chosen else ""
        cells.append(
            f'<label class="cell{" chosen" if k == chosen else ""}"><input type="radio" name="view-{index}" '
            f'value="{length}" data-caption="{says}" aria-label="{says}" autocomplete="off">'
            f'<img src="{_data_uri(image)}" alt="{name}, drawn from {length} tokens"><b>{length}</b>{score}'
            f"{'<strong>chosen</strong>' if k == chosen else ''}</label>"
        )
    curve = _curve(summary, index, picture)
    columns = 3 if not curve else len(cells) if len(cells) <= 6 else min(math.ceil(len(cells) / 2), 8)
    data = " ".join(f'data-{key}="{place}"' for key, place in ranks.items())
    return f"""<article class="card" {data} aria-labelledby="name-{index}">
<header><h3 id="name-{index}"><bdi>{name}</bdi></h3>
<p class="soft">{picture.lengths[chosen]} tokens · {picture.width} &times; {picture.height}{badge}</p></header>
<div class="view{"" if curve else " plain"}">
<figure class="stage">{original}<figcaption>original</figcaption></figure>
<fieldset class="strip" style="--columns:{columns}"><legend class="sr">Show in the large picture</legend>
{"".join(cells)}</fieldset>
{curve}</div>
</article>"""


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


def _rejects(summary: Summary, rejects: Sequence[tuple[str, str, str]]) -> str:
    if not rejects:
        return ""
    rows = "\n".join(
        f"<tr><td><bdi>{_text(name)}</bdi></td><td>{_text(reason)}</td><td>{_text(message)}</td></tr>"
        for name, reason, message in rejects
    )
    return f"""<section>
<h2>Rejected files</h2>
<p class="soft">{len(rejects):,} of {summary.rejects:,}.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Rejected files">
<table><thead><tr><th scope="col">file</th><th scope="col">reason</th><th scope="col">message</th></tr></thead>
<tbody>
{rows}
</tbody></table></div>
</section>"""
