"""A web page of a token dataset: photographs beside what every length makes of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from alit.dataset import TokenDataset
from alit.encoding.criteria import parse
from alit.images.encode import encode_image, to_uint8
from alit.images.tensors import to_tensor
from alit.weights import Weights
from jobs.gallery.contents import Picture, Summary
from jobs.gallery.page import render
from jobs.runtime.weights import load
from jobs.sources.decode import Decoded, decoded_plan
from jobs.sources.open import make_plan
from jobs.sources.records import InputError
from jobs.storage.path import parse_uri

BATCH = 32


def show(
    dataset: str,
    source: str,
    page: str | Path,
    *,
    weights: str | None = None,
    pictures: int = 48,
    image_column: str = "image",
    id_column: str | None = None,
    images_per_second: float = math.nan,
    title: str = "Photographs in as few tokens as they need",
) -> int:
    """Writes the page and returns how many photographs are on it.

    Args:
        dataset: a finished token dataset.
        source: the input that it was made from.
        page: the HTML file to write, over what was there.
        weights: those that made the dataset; the packaged ones when None.
        pictures: how many photographs to show at most, the first ones of the input.
        image_column, id_column: of Parquet input, as for `tokenize`.
        images_per_second: to show among the figures.
        title: the page's heading.

    Raises:
        AlitError: the dataset, the source or the weights do not fit together.
    """
    loaded = load(weights)
    where = parse_uri(dataset)
    tokens = TokenDataset(where.path, where.filesystem)
    tokens.require(loaded.fingerprint)
    plan = make_plan(source, rows_per_file=1024, image_column=image_column, id_column=id_column)
    rows = tokens.table(["id", "num_tokens", "satisfied"])
    chosen = {row["id"]: row for row in rows.to_pylist()}
    cards: list[Picture] = []
    for decoded in decoded_plan(plan, loaded.model.config.image_size, BATCH):
        ids = [name for name, good in zip(decoded.ids, decoded.good, strict=True) if good]
        known = [i for i, name in enumerate(ids) if name in chosen][: pictures - len(cards)]
        if known:
            cards += _cards(loaded, tokens.metadata.criterion, decoded, ids, known, chosen)
        if len(cards) >= pictures:
            break
    if not cards and len(tokens):
        raise InputError(f"no image of {source!r} is in the dataset {dataset!r}; name the input that it was made from")
    criterion, metadata = parse(tokens.metadata.criterion), tokens.metadata
    counts = {int(length): count for length, count in tokens.manifest["lengths"].items()}
    summary = Summary(
        title=title,
        criterion=criterion.spec,
        higher_is_better=criterion.higher_is_better,
        threshold=None if criterion.measure is None else criterion.threshold,
        images=len(tokens),
        rejects=int(tokens.manifest["rejects"]),
        mean_tokens=tokens.manifest["tokens"] / max(1, len(tokens)),
        histogram=counts or dict.fromkeys(loaded.model.config.lengths, 0),
        bits_per_token=metadata.bits_per_token,
        images_per_second=images_per_second,
        fingerprint=metadata.fingerprint,
        dataset=dataset,
        facts={"model's size": f"{metadata.image_size} x {metadata.image_size} pixels", "made with": metadata.software},
    )
    rejects = [(row["id"], row["reason"], row["message"]) for row in tokens.rejects().slice(0, 200).to_pylist()]
    parse_uri(str(page)).write(render(summary, cards, rejects).encode())
    return len(cards)


def _cards(
    weights: Weights, spec: str, decoded: Decoded, ids: list[str], rows: list[int], chosen: dict[str, dict[str, object]]
) -> list[Picture]:
    """The photographs `rows` of a batch, with every length's reconstruction and score."""
    model, lengths = weights.model, weights.model.config.lengths
    images = to_tensor(decoded.pixels[rows])
    criterion = parse(spec)
    trace = None
    if not criterion.is_fixed:  # never satisfied, so that every length is scored
        unreachable = math.inf if criterion.higher_is_better else -math.inf
        trace = model.encode(images, dataclasses.replace(criterion, threshold=unreachable)).trace.numpy()
    pictures: list[np.ndarray] = [to_uint8(model.decode(tokens)) for tokens in model.encode_all(images)]
    cards = []
    for i, row in enumerate(rows):
        facts = chosen[ids[row]]
        cards.append(
            Picture(
                id=ids[row],
                original=encode_image(decoded.pixels[row]),
                reconstructions=tuple(encode_image(length[i]) for length in pictures),
                lengths=lengths,
                scores=() if trace is None else tuple(float(value) for value in trace[i]),
                chosen=lengths.index(int(str(facts["num_tokens"]))),
                satisfied=bool(facts["satisfied"]),
                width=int(decoded.sizes[row][0]),
                height=int(decoded.sizes[row][1]),
            )
        )
    return cards
