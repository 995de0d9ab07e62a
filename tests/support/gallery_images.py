"""Images of a gallery page."""

from __future__ import annotations

import io

from PIL import Image

from jobs.gallery.contents import GalleryImage

LENGTHS = (16, 32, 48, 64)

SCORES = (0.21, 0.12, 0.0434, 0.0311)


def plain_image(shade: int, kind: str = "PNG") -> bytes:
    """Returns a file of one color."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 90, 40)).save(file, kind)
    return file.getvalue()


def gallery_image(
    name: str = "kite.jpg", scores: tuple[float | None, ...] = SCORES, chosen: int = 2, satisfied: bool = True
) -> GalleryImage:
    """Returns an image of a gallery page, with four lengths."""
    return GalleryImage(
        id=name,
        original=plain_image(200),
        reconstructions=tuple(plain_image(20 * k) for k in range(len(LENGTHS))),
        lengths=LENGTHS,
        scores=scores,
        chosen=chosen,
        satisfied=satisfied,
        width=500,
        height=375,
    )
