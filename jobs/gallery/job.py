"""The driver of `alit show`: reads a token dataset and its input, reconstructs images and writes the page."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from alit.dataset import TokenDataset
from alit.encoding.criteria import parse
from alit.images.encode import encode_image, to_uint8
from alit.images.tensors import to_tensor
from alit.weights import Weights
from jobs.gallery.contents import DatasetSummary, GalleryImage
from jobs.gallery.options import ShowOptions
from jobs.gallery.page import render
from jobs.runtime.weights import load
from jobs.sources.decode import Decoded, decode_plan
from jobs.sources.open import make_plan
from jobs.sources.records import InputError
from jobs.storage.path import parse_uri

BATCH_SIZE = 32
MAX_REJECTS = 200
"""Rejects listed on the page."""
TITLE = "Photographs in as few tokens as they need"
DEFAULTS = ShowOptions()


def show(
    dataset: str,
    source: str,
    page: str | Path,
    options: ShowOptions = DEFAULTS,
    *,
    images_per_second: float = math.nan,
) -> int:
    """Writes the page, replacing an existing file.

    Args:
        dataset: A finished token dataset.
        source: The input that it was made from.
        page: The HTML file to write.
        options: Options of `alit show`.
        images_per_second: Throughput of the run, shown among the figures; NaN where unknown.

    Returns:
        The number of images on the page.

    Raises:
        AlitError: The dataset, the source and the weights do not fit together.
    """
    weights = load(options.weights)
    folder = parse_uri(dataset)
    tokens = TokenDataset(folder.path, folder.filesystem)
    tokens.require(weights.fingerprint)
    images = _gallery_images(source, tokens, weights, options)
    if not images and len(tokens):
        raise InputError(f"no image of {source!r} is in the dataset {dataset!r}; name the input that it was made from")
    summary = _summarize(tokens, weights, dataset, images_per_second)
    rejects = [(row["id"], row["reason"], row["message"]) for row in tokens.rejects().slice(0, MAX_REJECTS).to_pylist()]
    parse_uri(str(page)).write(render(summary, images, rejects).encode())
    return len(images)


def _gallery_images(source: str, tokens: TokenDataset, weights: Weights, options: ShowOptions) -> list[GalleryImage]:
    """Reconstructs the first images of the input that are in the dataset."""
    plan = make_plan(source, rows_per_file=1024, image_column=options.image_column, id_column=options.id_column)
    records = {row["id"]: row for row in tokens.table(["id", "num_tokens", "satisfied"]).to_pylist()}
    images: list[GalleryImage] = []
    for decoded in decode_plan(plan, weights.model.config.image_size, BATCH_SIZE):
        ids = [name for name, good in zip(decoded.ids, decoded.good, strict=True) if good]
        rows = [i for i, name in enumerate(ids) if name in records][: options.images - len(images)]
        if rows:
            images += _reconstruct(weights, tokens.metadata.criterion, decoded, ids, rows, records)
        if len(images) >= options.images:
            break
    return images


def _reconstruct(
    weights: Weights, spec: str, decoded: Decoded, ids: list[str], rows: list[int], records: dict[str, dict[str, Any]]
) -> list[GalleryImage]:
    """Returns the images at `rows` of a batch, with the reconstruction and the score at every length."""
    model, lengths = weights.model, weights.model.config.lengths
    batch = to_tensor(decoded.pixels[rows])
    criterion = parse(spec)
    trace = None
    if not criterion.is_fixed:  # with a threshold that no score satisfies, every length is scored
        unreachable = math.inf if criterion.higher_is_better else -math.inf
        trace = model.encode(batch, dataclasses.replace(criterion, threshold=unreachable)).trace.numpy()
    reconstructions = [to_uint8(model.decode(tokens)) for tokens in model.encode_all(batch)]
    return [
        GalleryImage(
            id=ids[row],
            original=encode_image(decoded.pixels[row]),
            reconstructions=tuple(encode_image(pixels[i]) for pixels in reconstructions),
            lengths=lengths,
            scores=() if trace is None else tuple(float(value) for value in trace[i]),
            chosen=lengths.index(int(records[ids[row]]["num_tokens"])),
            satisfied=bool(records[ids[row]]["satisfied"]),
            width=int(decoded.sizes[row][0]),
            height=int(decoded.sizes[row][1]),
        )
        for i, row in enumerate(rows)
    ]


def _summarize(tokens: TokenDataset, weights: Weights, dataset: str, images_per_second: float) -> DatasetSummary:
    metadata, manifest = tokens.metadata, tokens.manifest
    criterion = parse(metadata.criterion)
    counts = {int(length): count for length, count in manifest["lengths"].items()}
    return DatasetSummary(
        title=TITLE,
        criterion=criterion.spec,
        higher_is_better=criterion.higher_is_better,
        threshold=None if criterion.is_fixed else criterion.threshold,
        images=len(tokens),
        rejects=int(manifest["rejects"]),
        mean_tokens=manifest["tokens"] / max(1, len(tokens)),
        histogram=counts or dict.fromkeys(weights.model.config.lengths, 0),
        bits_per_token=metadata.bits_per_token,
        images_per_second=images_per_second,
        fingerprint=metadata.fingerprint,
        dataset=dataset,
        facts={"model's size": f"{metadata.image_size} x {metadata.image_size} pixels", "made with": metadata.software},
    )
