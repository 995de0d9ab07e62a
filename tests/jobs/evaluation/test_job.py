"""Whole evaluations of small random models, in this process and on a real Ray."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import blob_images, to_tensor
from PIL import Image
from rich.console import Console
from small_models import TINY, random_model

from alit.errors import AlitError
from alit.images.encode import encode_image, to_uint8
from alit.metrics import pixel
from alit.metrics.fid import Moments, frechet_distance
from alit.metrics.lpips import Perceptual
from alit.model.config import KLConfig
from alit.reconstruction import mean_color, perplexity
from alit.weights import save_weights
from jobs.evaluation import job
from jobs.evaluation.job import evaluate
from jobs.evaluation.markdown import markdown
from jobs.evaluation.models import EvaluationModels
from jobs.evaluation.options import EvaluateOptions, EvaluationPaths
from jobs.evaluation.plot import draw
from jobs.evaluation.results import Evaluation


class FakeInception(torch.nn.Module):
    """A few numbers of an image; the real one takes seconds."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, 8).flatten(1)


def test_evaluate_agrees_with_the_model(models, result):
    """Every number of an evaluation equals one computed from the model's own encodings."""
    images = to_tensor(blob_images(12))
    x = images.float() / 255
    for code, tokens in zip(result.lengths, models.model.encode_all(images), strict=True):
        with torch.inference_mode():
            unclamped = models.model.reconstruct(models.model.to_codes(tokens))
        assert code.quality.l1 == pytest.approx(float((unclamped - x).abs().mean()), abs=1e-6)
        assert code.quality.psnr == pytest.approx(float(pixel.psnr(x, unclamped.clamp(0, 1)).mean()), abs=1e-4)
        assert code.codes_used == pytest.approx(perplexity(tokens.numpy(), 64))
        assert code.bits_per_pixel == code.tokens * 6 / 16**2
    for before, after in pairwise(result.lengths):
        assert after.change.mean == pytest.approx(after.quality.l1 - before.quality.l1, abs=1e-6)
        assert after.change.low <= after.change.mean <= after.change.high
    assert result.mean_color.l1 == pytest.approx(float(pixel.l1(x, mean_color(x)).mean()), abs=1e-6)
    assert result.base.tokens == 64
    assert result.base.bits_per_pixel == 64 * 5 / 16**2
    for row in result.adaptive:
        tokens = models.model.encode(images, f"l1:{row.threshold}").num_tokens
        assert row.counts == [int((tokens == code.tokens).sum()) for code in result.lengths]
        assert row.mean_tokens == pytest.approx(float(tokens.float().mean()))


def test_evaluate_compares_weights_image_by_image(models, result):
    """Other weights are compared image by image at the lengths that both models have."""
    other = evaluate(EvaluationModels(model=models.against), [blob_images(12)])
    assert result.against.lengths == [4, 8, 12]
    for ours, theirs, difference in zip(result.lengths, other.lengths, result.against.differences, strict=False):
        assert difference.mean == pytest.approx(ours.quality.l1 - theirs.quality.l1, abs=1e-6)
    assert result.against.base.mean == pytest.approx(result.base.quality.l1 - other.base.quality.l1, abs=1e-6)
    itself = evaluate(EvaluationModels(model=models.model, against=models.model), [blob_images(12)]).against
    assert [d.mean for d in (*itself.differences, itself.base)] == [0] * 5


def test_evaluate_measures_lpips_and_rfid():
    """LPIPS and rFID are measured where their networks are given."""
    models = EvaluationModels(model=random_model(), perceptual=Perceptual(), inception=FakeInception())  # type: ignore[arg-type]
    pixels = blob_images(6)
    result = evaluate(models, [pixels[:2], pixels[2:]])
    x = to_tensor(pixels).float() / 255
    with torch.inference_mode():
        base = models.model.base
        picture = base.decode(base.encode(x).target_BDhw)
        rounded = to_tensor(to_uint8(picture)).float() / 255
        expected = float(models.perceptual(x, picture.clamp(0, 1)).mean())
        moments = Moments(12), Moments(12)
        moments[0].add(FakeInception()(rounded))
        moments[1].add(FakeInception()(x))
    assert result.base.quality.lpips == pytest.approx(expected, rel=1e-4)
    assert result.base.quality.rfid == pytest.approx(frechet_distance(*moments), rel=1e-6, abs=1e-9)
    assert all(code.quality.rfid > 0 for code in result.lengths)
    assert "LPIPS | rFID" in markdown(result)


@pytest.mark.parametrize("continuous", ["latents", "base"])
def test_evaluate_accepts_continuous_models(continuous):
    """Continuous latents have distances, but neither rates nor codebook usage."""
    kl = KLConfig(channels=(32, 32), blocks=1, latent_dim=4)
    config = replace(TINY, codebook_size=None) if continuous == "latents" else replace(TINY, base=kl)
    result = evaluate(EvaluationModels(model=random_model(config)), [blob_images(3)], [0.2])
    assert (result.lengths[0].codes_used is None) == (continuous == "latents")
    assert (result.base.codes_used is None) == (continuous == "base")
    if continuous == "latents":
        assert result.lengths[0].bits_per_pixel is result.adaptive[0].bits_per_pixel is None
        assert result.codecs == []
    assert result.lengths[-1].quality.l1 > 0
    assert "| 16 |" in markdown(result)
    assert draw(result, "png").startswith(b"\x89PNG")


def test_evaluate_is_finite_on_flat_images(models):
    """An evaluation of flat images holds finite numbers only."""
    result = evaluate(models, [np.zeros((2, 16, 16, 3), np.uint8)], [0.2])
    json.dumps(result.to_json(), allow_nan=False)
    assert result.mean_color.psnr == 100
    assert result.adaptive[0].spearman_jpeg == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, others, some of another size, and twelve images with a broken one among them."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "photos").mkdir()
    save_weights(root / "weights", random_model(), provenance={})
    save_weights(root / "other", random_model(seed=1), provenance={})
    save_weights(root / "larger", random_model(replace(TINY, image_size=32)), provenance={})
    for index, pixels in enumerate(blob_images(11, 24)):
        (root / "photos" / f"{index:02}.png").write_bytes(encode_image(pixels))
    (root / "photos" / "05b.jpg").write_bytes(b"hello")
    return root


def run(folder: Path, output: str | None = None, source: str | Path = "photos", **options) -> Evaluation:
    names = [name for name in EvaluationPaths.__dataclass_fields__ if name in options]
    paths = EvaluationPaths(**({"weights": str(folder / "weights")} | {name: options.pop(name) for name in names}))
    return job.run(str(folder / source), output, EvaluateOptions(paths=paths, **options), Console(quiet=True))


def test_run_on_ray_agrees_with_one_process(folder, ray_session, capsys):
    """An evaluation on Ray equals one in this process, and its reports hold every section."""
    output = str(folder / "reports" / "small.model")
    options = {"thresholds": (0.2, 0.3), "against": str(folder / "other")}
    result = run(folder, output, workers=1, **options)
    here = run(folder, ray=False, **options)
    assert result.to_json() == here.to_json() or _close(result.to_json(), here.to_json())
    written = json.loads(Path(output + ".json").read_text())
    assert written["images"] == 11
    assert [(reject["id"], reject["reason"]) for reject in written["rejects"]] == [("05b.jpg", "not_an_image")]
    assert [code["tokens"] for code in written["lengths"]] == [4, 8, 12, 16]
    assert [row["threshold"] for row in written["adaptive"]] == [0.2, 0.3]
    assert [codec["images"] for codec in written["codecs"]] == [11, 11]
    assert written["against"]["lengths"] == [4, 8, 12, 16]
    assert written["criterion"] == TINY.criterion
    text = Path(output + ".md").read_text()
    assert text in capsys.readouterr().out
    for words in ("11 images of 16 x 16", "1 more could not be decoded", "| 16 |", "| l1:0.3 |", "JPEG cannot get"):
        assert words in text
    Image.open(output + ".png").verify()
    assert ElementTree.parse(output + ".svg").getroot().tag.endswith("svg")


def _close(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_close, a, b))
    return a == pytest.approx(b, rel=1e-4, abs=1e-6) if isinstance(a, float) else a == b


def test_run_on_parquet_agrees_with_files(folder):
    """An evaluation of a Parquet table equals that of the same images as files."""
    files = sorted((folder / "photos").glob("*"))
    pq.write_table(pa.table({"photo": [file.read_bytes() for file in files]}), folder / "t.parquet", row_group_size=5)
    options = {"source": "t.parquet", "image_column": "photo", "ray": False}
    found = run(folder, **options).to_json()
    expected = run(folder, ray=False).to_json()
    assert found.pop("rejects")[0]["id"] == "t.parquet#6"
    expected.pop("rejects")
    assert found == expected
    few = run(folder, limit=4, **options)
    assert few.images + len(few.rejects) == 4


def test_run_refuses_mistakes_first(folder, tmp_path):
    """Mistakes in options and inputs are reported with one sentence before anything is measured."""
    (tmp_path / "empty").mkdir()
    for options, sentence in (
        ({"thresholds": (0.1, -1.0)}, "positive numbers, such as 0.1, got -1"),
        ({"thresholds": (math.nan,)}, "positive numbers"),
        ({"vgg": "vgg.pth"}, "--vgg is given, --lpips is missing"),
        ({"lpips": "heads.pth"}, "--lpips is given, --vgg is missing"),
        ({"inception": str(tmp_path / "none.pth")}, "cannot be read"),
        ({"against": str(folder / "larger")}, "images of 32 pixels, but the evaluated weights take 16"),
        ({"limit": 0}, "--most must be at least 1, got 0"),
        ({"workers": 0}, "--workers must be at least 1"),
    ):
        with pytest.raises(AlitError, match=sentence):
            run(folder, **options)
    with pytest.raises(AlitError, match="no images in"):
        run(folder, source=tmp_path / "empty")
    (tmp_path / "empty" / "text.jpg").write_bytes(b"hello")
    with pytest.raises(AlitError, match=r"1 images could not be decoded, such as 'text\.jpg'"):
        run(folder, source=tmp_path / "empty", ray=False)
