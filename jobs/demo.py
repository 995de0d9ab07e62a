"""The demo: tokenizes scikit-image's photographs with the packaged weights and draws a page of the results."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rich.console import Console

from alit.errors import AlitError
from jobs.gallery.job import show
from jobs.storage.path import parse_uri
from jobs.tokenization.job import print_summary, tokenize
from jobs.tokenization.options import TokenizeOptions

PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)


def demo(folder: Path, console: Console) -> Path:
    """Tokenizes the photographs and draws a page of the results.

    Args:
        folder: Receives `photographs`, `tokens` and `index.html`.
        console: Where progress and results are printed.

    Returns:
        The path of the page.

    Raises:
        AlitError: scikit-image is not installed.
    """
    spec = importlib.util.find_spec("skimage")  # not imported, as only its files are needed
    if spec is None or not spec.submodule_search_locations:
        raise AlitError("the demo's photographs come with scikit-image: pip install 'alit[demo]'")
    data = Path(spec.submodule_search_locations[0]) / "data"
    photographs, tokens, page = folder / "photographs", folder / "tokens", folder / "index.html"
    for name in PHOTOGRAPHS:
        if (data / name).is_file():
            parse_uri(str(photographs / name)).write((data / name).read_bytes())
    summary = tokenize(str(photographs), str(tokens), TokenizeOptions(overwrite=True), console)
    print_summary(summary, console)
    show(str(tokens), str(photographs), page, images_per_second=summary.images_per_second)
    console.print(f"page: {page}")
    return page
