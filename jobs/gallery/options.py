"""Options of `alit show`, without torch, so that help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowOptions:
    """Everything but DATASET, INPUT and PAGE.

    Attributes:
        weights: The weights folder that made the dataset; the packaged one when not given.
        images: Maximum number of images to show, the first ones of the input.
        image_column: As for tokenize.
        id_column: As for tokenize.
    """

    weights: str | None = None
    images: Annotated[int, arg(name="pictures")] = 48
    image_column: str = "image"
    id_column: str | None = None
