"""The command `alit show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


def show(
    dataset: Positional[Annotated[str, arg(metavar="DATASET")]],
    source: Positional[Annotated[str, arg(metavar="INPUT")]],
    page: Positional[Annotated[Path, arg(metavar="PAGE")]],
    /,
    *,
    weights: str | None = None,
    pictures: int = 48,
    image_column: str = "image",
    id_column: str | None = None,
) -> None:
    """Draw a web page of a token dataset: photographs beside what every length makes of them.

    Example: alit show tokens/ photos/ page.html

    Args:
        dataset: A finished token dataset.
        source: The input that it was made from.
        page: The HTML file to write; it holds everything and needs no network.
        weights: The weights folder that made the dataset; the packaged one when not given.
        pictures: Photographs to show at most.
        image_column: As for tokenize.
        id_column: As for tokenize.
    """
    from jobs.gallery import job

    shown = job.show(
        dataset,
        source,
        page,
        weights=weights,
        pictures=pictures,
        image_column=image_column,
        id_column=id_column,
    )
    print(f"{page}: {shown} photographs")
