"""What a gallery page shows is consistent."""

from __future__ import annotations

import pytest
from gallery_images import gallery_image

from jobs.gallery.contents import GalleryImage


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lengths": ()}, "lengths must increase"),
        ({"lengths": (16, 16, 32, 48)}, "lengths must increase"),
        ({"reconstructions": ()}, "got 0 and 4"),
        ({"scores": (0.5,)}, "got 4 and 1"),
        ({"chosen": 4}, "got 4"),
        ({"chosen": -1}, "got -1"),
    ],
)
def test_gallery_image_refuses_inconsistent_fields(changes: dict[str, object], told: str) -> None:
    """Lengths, reconstructions, scores and choice of an image must be consistent."""
    one = gallery_image()
    values = {name: getattr(one, name) for name in GalleryImage.__dataclass_fields__}
    with pytest.raises(ValueError, match=told):
        GalleryImage(**(values | changes))
