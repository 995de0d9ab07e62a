"""`alit show` draws datasets and refuses what does not belong to them."""

from __future__ import annotations

import pytest
from small_models import SMALLER, random_model
from tokenizing import tokenize_in_process

from alit.errors import AlitError
from alit.weights import load_weights, save_weights
from jobs.gallery.job import show
from jobs.gallery.options import ShowOptions


@pytest.mark.parametrize("criterion", ["l1:0.3", "psnr:9", "fixed:8"])
def test_show_draws_every_image(image_folder, small_weights, tmp_path, criterion):
    """The gallery shows every tokenized image and names the rejected ones."""
    (image_folder / "broken.jpg").write_bytes(b"not a picture")
    tokenize_in_process(
        str(image_folder),
        str(tmp_path / "tokens"),
        load_weights(small_weights),
        criterion,
        rows_per_file=5,
        batch_size=4,
    )
    shown = show(
        str(tmp_path / "tokens"), str(image_folder), tmp_path / "page.html", ShowOptions(weights=str(small_weights))
    )
    page = (tmp_path / "page.html").read_text()
    assert shown == 12
    assert all(f"{i:02d}.png" in page for i in range(12))
    assert "broken.jpg" in page


def test_show_refuses_other_weights_and_inputs(image_folder, small_weights, tmp_path):
    """The gallery refuses weights and inputs that the dataset was not made with, and writes nothing."""
    tokenize_in_process(
        str(image_folder),
        str(tmp_path / "tokens"),
        load_weights(small_weights),
        "fixed:4",
        rows_per_file=5,
        batch_size=4,
    )
    save_weights(tmp_path / "other", random_model(SMALLER, seed=1), provenance={})
    with pytest.raises(AlitError, match="was tokenized with the weights"):
        show(
            str(tmp_path / "tokens"),
            str(image_folder),
            tmp_path / "page.html",
            ShowOptions(weights=str(tmp_path / "other")),
        )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "stranger.png").write_bytes((image_folder / "00.png").read_bytes())
    with pytest.raises(AlitError, match="no image of"):
        show(str(tmp_path / "tokens"), str(elsewhere), tmp_path / "page.html", ShowOptions(weights=str(small_weights)))
    assert not (tmp_path / "page.html").exists()
