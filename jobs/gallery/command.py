"""The command `alit show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from jobs.gallery.options import ShowOptions

DEFAULTS = ShowOptions()


def show(
    dataset: Positional[Annotated[str, arg(metavar="DATASET")]],
    source: Positional[Annotated[str, arg(metavar="INPUT")]],
    page: Positional[Annotated[Path, arg(metavar="PAGE")]],
    /,
    *,
    options: Annotated[ShowOptions, arg(name="")] = DEFAULTS,
) -> None:
    """Draw a web page of a token dataset: images beside their reconstructions from every length.

    Example: alit show tokens/ photos/ page.html

    Args:
        dataset: A finished token dataset.
        source: The input that it was made from.
        page: The HTML file to write; it is self-contained and needs no network.
        options: See `ShowOptions`.
    """
    from jobs.gallery import job

    shown = job.show(dataset, source, page, options)
    print(f"{page}: {shown} photographs")
