"""The evaluation's arithmetic against independent computations, and its whole on small random models and a real Ray."""

from __future__ import annotations

import io
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
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from small_models import TINY

from alit.errors import AlitError
from alit.images.encode import encode_image, to_uint8
from alit.metrics import pixel
from alit.metrics.fid import Moments, frechet_distance
from alit.metrics.lpips import Perceptual
from alit.model.config import AlitConfig, KLConfig
from alit.reconstruction import first_within, gradient_entropy, mean_color, perplexity
from alit.tokenizer import Alit
from alit.weights import save_weights
from jobs.evaluation import job
from jobs.evaluation.bootstrap import adaptive_gain, bootstrap_mean, spearman
from jobs.evaluation.image_codecs import measure_codecs, nearest_files
from jobs.evaluation.job import evaluate
from jobs.evaluation.markdown import markdown
from jobs.evaluation.models import EvaluationModels
from jobs.evaluation.options import EvaluateOptions, EvaluationPaths
from jobs.evaluation.per_image import BatchMeasurements, MeasurementCollector, Measurements, RejectedImage, measure
from jobs.evaluation.plot import draw
from jobs.evaluation.report import measure_adaptive
from jobs.evaluation.results import Evaluation
from jobs.evaluation.units import evenly_spaced, work_units
from jobs.sources.records import Row


def model(config: AlitConfig = TINY, seed: int = 0) -> Alit:
    torch.manual_seed(seed)
    return Alit(config).eval()


def pictures(count: int, size: int = 16) -> np.ndarray:
    """From smooth to busy, uint8 [B, S, S, 3]."""
    random = np.random.default_rng(3)
    found = []
    for index in range(count):
        blobs = random.integers(0, 256, (1 + index, 1 + index, 3), np.uint8)
        found.append(np.asarray(Image.fromarray(blobs).resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(found)


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def models() -> EvaluationModels:
    return EvaluationModels(model=model(), fingerprint="f" * 64, against=model(replace(TINY, iterations=3), seed=1))


@pytest.fixture(scope="module")
def result(models: EvaluationModels) -> Evaluation:
    return evaluate(models, [pictures(12)[:5], pictures(12)[5:]])


class FakeInception(torch.nn.Module):
    """A few numbers of an image; the real one takes seconds."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, 8).flatten(1)


# -------------------------------------------------------------------- statistics


@given(st.lists(st.integers(0, 5), min_size=3, max_size=30), st.randoms())
def test_spearman_agrees_with_scipy(values, random):
    """The rank correlation equals SciPy's, with ties too."""
    other = values[:]
    random.shuffle(other)
    expected = 0.0 if len(set(values)) == 1 else scipy.stats.spearmanr(values, other).statistic
    assert spearman(values, other) == pytest.approx(expected, abs=1e-9)


def test_bootstrap_agrees_with_scipy(monkeypatch):
    """The bootstrap interval of a mean equals SciPy's percentile interval."""
    differences = np.random.default_rng(1).normal(0.3, 1.0, 400)
    monkeypatch.setattr("jobs.evaluation.bootstrap.CHUNK_CELLS", 1000 * 400)  # in several parts
    found = bootstrap_mean(differences)
    expected = scipy.stats.bootstrap((differences,), np.mean, method="percentile", n_resamples=5000, rng=2)
    assert found.mean == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), abs=0.01)


def test_perplexity_is_the_exponential_of_the_entropy():
    """The perplexity of ids is e to the power of their entropy."""
    ids = np.random.default_rng(0).integers(0, 40, (7, 9)) ** 2 // 40
    counts = np.bincount(ids.ravel(), minlength=64)
    assert perplexity(ids, 64) == pytest.approx(math.exp(scipy.stats.entropy(counts)))
    assert perplexity(np.arange(10).repeat(3), 64) == pytest.approx(10)


def test_adaptive_gain_compares_with_interpolated_lengths():
    """The adaptive gain is the error beyond that of fixed lengths interpolated to the same mean."""
    random = np.random.default_rng(5)
    lengths = (16, 32, 48)
    errors = np.sort(random.uniform(0, 0.3, (3, 200)), axis=0)[::-1].astype(np.float32)
    chosen = first_within(errors, 0.15)
    mean = np.asarray(lengths)[chosen].mean()
    own = errors[chosen, np.arange(200)]
    expected = own.mean() - np.interp(mean, lengths, errors.mean(1))
    assert adaptive_gain(errors, lengths, chosen).mean == pytest.approx(expected, abs=1e-6)
    for same in (
        adaptive_gain(errors, lengths, np.full(200, 2)),
        adaptive_gain(errors[:1], lengths[:1], np.zeros(200, int)),
    ):
        assert (same.mean, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-9)


def test_adaptive_gain_interval_agrees_with_resampling():
    """The interval of the gain is that of computing it anew in every bootstrap sample."""
    random = np.random.default_rng(6)
    lengths = (16, 32, 48, 64)
    hard = random.uniform(0.5, 2, 500)
    errors = (hard * np.array([[0.12], [0.10], [0.08], [0.07]]) * random.uniform(0.9, 1.1, (4, 500))).astype(np.float32)
    chosen = first_within(errors, 0.1)
    found = adaptive_gain(errors, lengths, chosen)
    tokens, own = np.asarray(lengths)[chosen], errors[chosen, np.arange(500)]
    again = []
    for _ in range(2000):
        rows = random.integers(500, size=500)
        again.append(own[rows].mean() - np.interp(tokens[rows].mean(), lengths, errors[:, rows].mean(1)))
    low, high = np.percentile(again, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))


# -------------------------------------------------------------------- measurements


def test_gradient_entropy_agrees_with_numpy():
    """The gradient entropy is 0 for a flat image and the entropy of the gradients' histogram otherwise."""
    flat = np.full((1, 32, 32, 3), 77, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    smooth = pictures(4, 32)[3:]
    found = gradient_entropy(tensor(np.concatenate([flat, smooth, noise])))
    assert found[0] == 0
    assert 0 < found[1] < found[2]
    assert found[2] > 4
    luma = noise[0].astype(np.float64) @ [0.299, 0.587, 0.114] / 255
    magnitude = np.hypot(np.diff(luma, axis=1)[:-1], np.diff(luma, axis=0)[:, :-1])
    counts, _ = np.histogram(magnitude, bins=64, range=(0, math.sqrt(2)))
    assert found[2] == pytest.approx(scipy.stats.entropy(counts, base=2), abs=0.01)


@given(st.lists(st.integers(0, 40), min_size=100, max_size=100), st.lists(st.integers(-10, 4200), max_size=4))
def test_nearest_picks_the_nearest_size(growth, targets):
    """The search over qualities finds the sizes nearest to its targets within nine encodings each."""
    sizes = np.cumsum(growth)  # of quality 1, 2, ...
    tried = []

    def encode(quality: int) -> bytes:
        tried.append(quality)
        return bytes(int(sizes[quality - 1]))

    for target, data in zip(targets, nearest_files(encode, targets), strict=True):
        assert abs(len(data) - target) == abs(sizes - target).min()
    assert len(tried) == len(set(tried)) <= 9 * len(targets)


def test_coded_reaches_sizes_or_the_smallest():
    """Codecs reach the target sizes where they can, and otherwise take their smallest or largest file."""
    pixels = pictures(3, 64)
    found = measure_codecs(pixels, [10, 900, 1e6])
    sizes = [[len(encode_image(image, codec, 1)) for codec in ("jpeg", "webp")] for image in pixels]
    assert found.smallest.tolist() == sizes
    assert found.size[..., 0].tolist() == sizes
    best = [len(encode_image(image, "jpeg", 100)) for image in pixels]
    assert found.size[:, 0, 2].tolist() == best
    assert (found.size[..., 1] >= found.size[..., 0]).all()
    assert (found.psnr[..., 2] > found.psnr[..., 0]).all()
    image = np.asarray(Image.open(io.BytesIO(encode_image(pixels[0], "jpeg", 1))).convert("RGB"))
    assert found.l1[0, 0, 0] == pytest.approx(np.abs(image.astype(float) - pixels[0]).mean() / 255, abs=1e-6)


# -------------------------------------------------------------------- the whole


def test_evaluate_agrees_with_the_model(models, result):
    """Every number of an evaluation equals one computed from the model's own encodings."""
    images = tensor(pictures(12))
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


def test_adaptive_takes_the_first_sufficient_length():
    """The adaptive row uses the first length that meets the threshold, and the longest where none does."""
    models = EvaluationModels(model=model())
    measured = measure(models, pictures(3), np.zeros(3, bool))
    errors = np.array([[0.3, 0.05, 0.4], [0.2, 0.2, 0.4], [0.1, 0.01, 0.4]], np.float32)
    chosen = measured._replace(l1=np.pad(errors.T, ((0, 0), (0, 3))), jpeg_bytes=np.array([300.0, 100.0, 500.0]))
    found = measure_adaptive(chosen, (4, 8, 12), 0.2, bits=0.5)
    assert found.counts == [1, 1, 1]
    assert (found.mean_tokens, found.bits_per_pixel) == (8, 4)
    assert found.satisfied == pytest.approx(2 / 3)
    assert found.l1 == pytest.approx((0.2 + 0.05 + 0.4) / 3)
    assert found.spearman_jpeg == pytest.approx(1.0)


def test_evaluate_compares_weights_image_by_image(models, result):
    """Other weights are compared image by image at the lengths that both models have."""
    other = evaluate(EvaluationModels(model=models.against), [pictures(12)])
    assert result.against.lengths == [4, 8, 12]
    for ours, theirs, difference in zip(result.lengths, other.lengths, result.against.differences, strict=False):
        assert difference.mean == pytest.approx(ours.quality.l1 - theirs.quality.l1, abs=1e-6)
    assert result.against.base.mean == pytest.approx(result.base.quality.l1 - other.base.quality.l1, abs=1e-6)
    itself = evaluate(EvaluationModels(model=models.model, against=models.model), [pictures(12)]).against
    assert [d.mean for d in (*itself.differences, itself.base)] == [0] * 5


def test_evaluate_measures_lpips_and_rfid():
    """LPIPS and rFID are measured where their networks are given."""
    models = EvaluationModels(model=model(), perceptual=Perceptual(), inception=FakeInception())  # type: ignore[arg-type]
    pixels = pictures(6)
    result = evaluate(models, [pixels[:2], pixels[2:]])
    x = tensor(pixels).float() / 255
    with torch.inference_mode():
        base = models.model.base
        picture = base.decode(base.encode(x).target_BDhw)
        rounded = tensor(to_uint8(picture)).float() / 255
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
    result = evaluate(EvaluationModels(model=model(config)), [pictures(3)], [0.2])
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


def test_collected_restores_parts_in_order(models):
    """Measurements of workers arrive unchanged, count once and are put in order."""
    measured = measure(models, pictures(4), np.array([True, False, True, False]))
    again = Measurements.unpack(measured.pack())
    for name, expected, found in zip(Measurements._fields, measured, again, strict=True):
        assert np.array_equal(expected, found), name
        assert expected.dtype == found.dtype
    assert len(measured.codec_bytes) == 2
    collected = MeasurementCollector()
    reject = RejectedImage("a.jpg", "empty", "no bytes")
    parts = [BatchMeasurements(0, measured, []), BatchMeasurements(1, measured._replace(l1=measured.l1 + 1), [reject])]
    for part in (parts[1], parts[0], parts[1]):
        collected.add(part)
    assert collected.processed == 9
    assert collected.rejects == [reject]
    assert np.array_equal(collected.measurements().l1, np.concatenate([measured.l1, measured.l1 + 1]))


@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 5), st.integers(1, 400))
def test_units_hold_every_image_once(count, size, workers, most):
    """Every selected image is in one batch, and batches do not depend on the number of workers."""
    kept = evenly_spaced(count, most)
    assert len(kept) == len(set(kept.tolist())) == min(count, most)
    rows = [Row(b"x", int(number)) for number in kept]
    found = work_units(rows, size, workers)
    assert [row for unit in found for row in unit.rows] == rows
    assert all(unit.first_batch * size == rows.index(unit.rows[0]) for unit in found)


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


# -------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, others, some of another size, and twelve images with a broken one among them."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "photos").mkdir()
    save_weights(root / "weights", model(), provenance={})
    save_weights(root / "other", model(seed=1), provenance={})
    save_weights(root / "larger", model(replace(TINY, image_size=32)), provenance={})
    for index, pixels in enumerate(pictures(11, 24)):
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
