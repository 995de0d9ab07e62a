"""The plots of an evaluation."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree

from PIL import Image

from jobs.evaluation.plot import draw


def test_draw_shows_every_curve(result):
    """The plots are valid PNG and SVG files and name every curve, the same in every run."""
    picture = Image.open(io.BytesIO(draw(result, "png")))
    picture.load()
    assert picture.format == "PNG"
    assert picture.width > 1000
    drawn = draw(result, "svg")
    assert drawn == draw(result, "svg")
    root = ElementTree.fromstring(drawn)
    assert root.tag.endswith("svg")
    text = " ".join(element.text or "" for element in root.iter() if element.tag.endswith("text"))
    for words in ("one length for all", "adaptive", "JPEG", "WebP", "base tokenizer", "PSNR in dB", "bits per pixel"):
        assert words in text
