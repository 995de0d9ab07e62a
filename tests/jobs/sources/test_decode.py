"""Images of an input are decoded, and bad ones get a reason."""

import numpy as np
from image_files import noise_image

from alit.images.decode import decode_image
from alit.images.formats import Limits
from jobs.sources.decode import decode_rows
from jobs.sources.records import Rows


def test_decode_rows_separates_images_from_rejects() -> None:
    """Decoding gives the pixels and sizes of good images, and a reason for each rejected one."""
    data = [noise_image(0), b"", None, noise_image(1, "jpeg"), b"not an image", noise_image(2)[:100]]
    errors = [None, None, "the disk is on fire", None, None, None]
    decoded = decode_rows(Rows(ids=list("abcdef"), data=data, errors=errors, kept=[]), 32, Limits())
    assert decoded.ids == list("abcdef")
    assert decoded.good.tolist() == [True, False, False, True, False, False]
    assert decoded.pixels.shape == (2, 32, 32, 3)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.sizes.tolist() == [[30, 20], [30, 21]]
    assert [reason for reason, _ in decoded.rejects] == ["empty", "unreadable", "not_an_image", "truncated"]
    assert decoded.rejects[1][1] == "the disk is on fire"
    assert (decoded.pixels[1] == decode_image(noise_image(1, "jpeg"), 32).pixels).all()


def test_decode_rows_may_give_no_pixels() -> None:
    """Rows without a good image give empty arrays of the right shapes."""
    decoded = decode_rows(Rows(ids=["a"], data=[b""], errors=[None], kept=[]), 32, Limits())
    assert decoded.pixels.shape == (0, 32, 32, 3)
    assert decoded.sizes.shape == (0, 2)


def test_decode_rows_applies_the_limits() -> None:
    """Images above the limits of bytes or pixels are rejected."""
    rows = Rows(ids=["a", "b"], data=[noise_image(0), noise_image(0)[:50]], errors=[None, None], kept=[])
    assert [reason for reason, _ in decode_rows(rows, 32, Limits(max_bytes=49)).rejects] == ["too_many_bytes"] * 2
    assert decode_rows(rows, 32, Limits(max_pixels=599)).rejects[0][0] == "too_many_pixels"
    assert not decode_rows(rows, 32, Limits(max_pixels=600)).rejects[0][0] == "too_many_pixels"
