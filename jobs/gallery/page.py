"""One web page that shows what the tokenizer made of some photographs.

The page is a single string: styles (`page.css`), script (`page.js`) and pictures lie inside it, and its content
security policy forbids it to fetch anything. It reads without the script; only flipping and sorting need it.
"""

from __future__ import annotations

import hashlib
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib import resources

from jobs.gallery.charts import _curve, _histogram, _ranks
from jobs.gallery.contents import _MEASURES, Picture, Summary
from jobs.gallery.markup import _data_uri, _number, _quantity, _text


def render(summary: Summary, pictures: Sequence[Picture], rejects: Sequence[tuple[str, str, str]] = ()) -> str:
    """The page, a function of its arguments alone.

    Args:
        summary: facts about the whole dataset.
        pictures: those to show, in this order.
        rejects: (id, reason, message) of images that could not be tokenized.

    Raises:
        ValueError: a picture's bytes are neither PNG, WebP nor JPEG.
    """
    files = resources.files("jobs.gallery")
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
