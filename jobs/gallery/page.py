"""One web page that shows a token dataset: its figures, and images beside their reconstructions.

The page is a single string: styles (`page.css`), script (`page.js`) and images lie inside it, and its content security
policy forbids it to fetch anything. It reads without the script; only flipping and sorting need it.
"""

from __future__ import annotations

import hashlib
import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from jobs.gallery.charts import ScoreCurve, histogram_chart, score_curve
from jobs.gallery.contents import CRITERION_DESCRIPTIONS, DatasetSummary, GalleryImage
from jobs.gallery.markup import environment, quantity, read_asset

SORT_LABELS = {
    "shown": "as given",
    "id": "name",
    "fewest": "fewest tokens",
    "most": "most tokens",
    "score": "best score",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One image on the page.

    Attributes:
        image: The image and its reconstructions.
        ranks: Its position in each order of `sort_ranks`.
        curve: Its score over tokens; None where it has no finite score.
        columns: Columns of the grid of reconstructions.
    """

    image: GalleryImage
    ranks: Mapping[str, int]
    curve: ScoreCurve | None
    columns: int


def render(
    summary: DatasetSummary, images: Sequence[GalleryImage], rejects: Sequence[tuple[str, str, str]] = ()
) -> str:
    """Returns the page as HTML, a function of the arguments alone.

    Args:
        summary: Facts about the whole dataset.
        images: Images to show, in this order.
        rejects: (id, reason, message) of images that could not be tokenized.

    Raises:
        ValueError: An image's bytes are neither PNG, WebP nor JPEG.
    """
    script = read_asset("page.js")
    lengths = sorted({*summary.histogram, *(n for image in images for n in image.lengths)})
    ranks = sort_ranks(summary, images)
    cards = [_card(summary, image, {key: order[i] for key, order in ranks.items()}) for i, image in enumerate(images)]
    facts = {
        "criterion": summary.criterion,
        "bits per token": quantity(summary.bits_per_token, 2),
        "model": summary.fingerprint,
        "dataset": summary.dataset,
        **summary.facts,
    }
    template = environment().get_template("page.html.jinja")
    return template.render(
        summary=summary,
        style=Markup(read_asset("page.css")),
        script=Markup(script),
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        descriptions=CRITERION_DESCRIPTIONS,
        lengths=lengths,
        histogram=histogram_chart(summary, lengths),
        facts=facts,
        cards=cards,
        views=sorted({n for image in images for n in image.lengths}),
        sorts={key: label for key, label in SORT_LABELS.items() if key in ranks},
        rejects=rejects,
    )


def _card(summary: DatasetSummary, image: GalleryImage, ranks: Mapping[str, int]) -> Card:
    curve, cells = score_curve(summary, image), 1 + len(image.lengths)
    columns = 3 if curve is None else cells if cells <= 6 else min(math.ceil(cells / 2), 8)
    return Card(image=image, ranks=ranks, curve=curve, columns=columns)


def sort_ranks(summary: DatasetSummary, images: Sequence[GalleryImage]) -> dict[str, list[int]]:
    """Returns every image's position in each order, by the keys of `SORT_LABELS`.

    Ties keep the order of `images`. Images without a score come last in the order by score, which is left out where no
    image has one.
    """

    def positions(keys: Iterable[Any]) -> list[int]:
        keyed = list(keys)
        order = sorted(range(len(keyed)), key=lambda i: (keyed[i], i))
        return [position for _, position in sorted((i, position) for position, i in enumerate(order))]

    tokens = [image.tokens for image in images]
    ranks = {
        "shown": list(range(len(images))),
        "id": positions(image.id for image in images),
        "fewest": positions(tokens),
        "most": positions(-n for n in tokens),
    }
    scores = [image.score(image.chosen) for image in images]
    if any(score is not None for score in scores):
        sign = -1 if summary.higher_is_better else 1
        ranks["score"] = positions((score is None, sign * (score or 0.0)) for score in scores)
    return ranks
