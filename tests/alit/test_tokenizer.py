"""Alit agrees with a naive reference, independently of the batch, and does no more work than needed.

Shapes: B batch, N latents, C code width, G base tokens, D base latent width, h w base grid.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from small_models import TINY
from torch import Tensor, nn

from alit.encoding.criteria import Candidate, Criterion, parse
from alit.encoding.results import Encoded
from alit.errors import CriterionError
from alit.model.config import AlitConfig, KLConfig
from alit.model.vqgan import VQGAN
from alit.tokenizer import Alit

CONTINUOUS = dataclasses.replace(TINY, codebook_size=None)
DETERMINISTIC = dataclasses.replace(TINY, halting="deterministic", halting_threshold=0.04)
SAMPLED = dataclasses.replace(TINY, halting="sampled", halting_threshold=0.0)
KL = dataclasses.replace(TINY, base=KLConfig(channels=(32, 32), blocks=1, latent_dim=4))
CONFIGS = {"quantized": TINY, "continuous": CONTINUOUS, "deterministic": DETERMINISTIC, "sampled": SAMPLED}

# each with a threshold that no image meets
STRICTEST = {"l1": "l1:0", "mse": "mse:0", "psnr": "psnr:100", "ssim": "ssim:1", "code": "code:0", "latent": "latent:0"}
PIXELS = ("l1", "mse", "psnr", "ssim")
NEAR_TIE = 1e-5
"""Scores nearer to the threshold than this may fall to either side of it."""


@cache
def images_u8() -> Tensor:
    """Seven smooth images."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(7, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(0, 1)
    return (255 * smooth).round().to(torch.uint8)


def images() -> Tensor:
    return images_u8() / 255


@torch.no_grad()
def lively(config: AlitConfig) -> Alit:
    """Random weights, larger than usual, so that images and lengths differ in their scores."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Alit(config).eval()
        for part in [*model.encoder.modules(), *model.decoder.modules()]:
            if isinstance(part, nn.Linear):
                part.weight.mul_(8)
        model.decoder.head[2].weight.mul_(20)
        model.decoder.code_positions.mul_(40)
        model.encoder.iteration_embedding.mul_(6)
        if isinstance(model.base, VQGAN):
            model.base.decoder.conv_out.bias.fill_(0.5)
            latents = model.base.encode(images()).latents_BDhw.permute(0, 2, 3, 1).flatten(0, 2)
            model.base.codebook.weight.copy_(latents[torch.randperm(len(latents))[:32]])
    return model


@cache
def model_of(name: str) -> Alit:
    return lively(KL if name == "kl" else CONFIGS[name])


@cache
def thresholds(model_name: str, name: str) -> str:
    """A criterion that gives as many different lengths as one can, with a threshold far from every score."""
    trace_BK = model_of(model_name).encode(images(), STRICTEST[name]).trace.double()
    scores = trace_BK.unique()  # sorted
    candidates = [(a + b).item() / 2 for a, b in pairwise(scores) if b - a > 20 * NEAR_TIE]

    def variety(threshold: float) -> int:
        good_BK = trace_BK >= threshold if name in ("psnr", "ssim") else trace_BK <= threshold
        first = [row.index(True) if True in row else None for row in good_BK.tolist()]
        return len(set(first))

    return f"{name}:{max(candidates, key=variety):.7f}"


def same(one: Encoded, other: Encoded, atol: float = 0) -> None:
    for field in ("num_tokens", "satisfied", "tried"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field
    for field in ("score", "trace", "tokens"):
        ours, theirs = getattr(one, field), getattr(other, field)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, equal_nan=True)


# ---------------------------------------------------------------- the naive reference


def ssim_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, window by window."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for c in range(3):
        for top in range(x.shape[1] - 10):
            for left in range(x.shape[2] - 10):
                a, b = (z[c, top : top + 11, left : left + 11] for z in (x, y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
                values.append(luminance * (2 * covariance + 9e-4) / (var_a + var_b + 9e-4))
    return float(np.mean(values))


@torch.no_grad()
def score_by_hand(model: Alit, name: str, image: Tensor, tokens: Tensor) -> float:
    """The score of one image [3, H, W] at the length of its tokens [N], alone."""
    codes_BNC = model.to_codes(tokens[None])
    if name in PIXELS:
        x, y = image.double().numpy(), model.reconstruct(codes_BNC)[0].double().numpy()
        mse = ((x - y) ** 2).mean()
        if name == "ssim":
            return ssim_by_hand(x, y)
        return {"l1": np.abs(x - y).mean(), "mse": mse, "psnr": 10 * math.log10(1 / mse)}[name]
    base, predictions_BGO = model.base.encode(image[None]), model.decoder(codes_BNC)
    if name == "code":
        return (predictions_BGO.argmax(-1) != base.ids_BG).double().mean().item()
    mean_GD = predictions_BGO[0].double().softmax(-1) @ model.base.codebook.weight.double()
    target_GD = model.base.codebook.weight[base.ids_BG[0]].double()
    return ((mean_GD - target_GD) ** 2).mean().sqrt().item()


@cache
def reference(model_name: str, name: str) -> np.ndarray:
    """Scores [B, K] of every image at every length, one by one."""
    model = model_of(model_name)
    scores = [
        [score_by_hand(model, name, image, ids[0]) for ids in model.encode_all(image[None])] for image in images()
    ]
    return np.array(scores)


@pytest.mark.parametrize("name", STRICTEST)
@pytest.mark.parametrize("model_name", CONFIGS)
def test_encode_agrees_with_naive_reference(model_name, name):
    """`encode` chooses the length, tokens and trace that a naive scoring of every length gives."""
    model, spec = model_of(model_name), thresholds(model_name, name)
    scores, threshold = reference(model_name, name), float(spec.split(":")[1])
    good = scores >= threshold if name in ("psnr", "ssim") else scores <= threshold
    encoded, every = model.encode(images(), spec), model.encode_all(images())
    tolerance = 1e-4 if name == "psnr" else 1e-5
    compared = 0
    for i, row in enumerate(encoded.split()):
        if np.abs(scores[i] - threshold).min() < NEAR_TIE:
            continue
        compared += 1
        k = int(good[i].argmax()) if good[i].any() else 3
        assert encoded.num_tokens[i] == TINY.lengths[k]
        assert encoded.satisfied[i] == good[i].any()
        assert encoded.tried[i] == k + 1
        torch.testing.assert_close(row, every[k][i], rtol=0, atol=1e-5)
        np.testing.assert_allclose(encoded.trace[i, : k + 1].numpy(), scores[i, : k + 1], atol=tolerance)
        assert encoded.trace[i, k + 1 :].isnan().all()
        assert encoded.score[i] == encoded.trace[i, k]
    assert compared >= 5


@pytest.mark.parametrize("model_name", CONFIGS)
def test_images_of_this_file_stop_at_every_length(model_name):
    """The images of this file stop at every length, and some never satisfy their criterion."""
    found = [model_of(model_name).encode(images(), thresholds(model_name, name)) for name in STRICTEST]
    assert {int(n) for encoded in found for n in encoded.num_tokens} == {*TINY.lengths}
    assert {bool(s) for encoded in found for s in encoded.satisfied} == {True, False}
    assert any(len(set(encoded.num_tokens.tolist())) >= 3 for encoded in found)


@pytest.mark.parametrize("model_name", CONFIGS)
@pytest.mark.parametrize("length", TINY.lengths)
def test_encode_fixed_returns_tokens_of_that_length(model_name, length):
    """`fixed:N` returns the same tokens as `encode_all` at length N."""
    model = model_of(model_name)
    encoded = model.encode(images(), f"fixed:{length}")
    expected = model.encode_all(images())[TINY.lengths.index(length)]
    torch.testing.assert_close(torch.stack(encoded.split()), expected, rtol=0, atol=1e-5)


def test_encode_all_returns_every_length_shortest_first():
    """`encode_all` returns int64 ids within the codebook for every length, shortest first."""
    every = model_of("quantized").encode_all(images())
    assert [tuple(ids.shape) for ids in every] == [(7, n) for n in TINY.lengths]
    assert all(ids.dtype == torch.int64 and ids.min() >= 0 and ids.max() < 64 for ids in every)


def test_encode_all_shorter_code_is_no_prefix():
    """A shorter code of an image is not a prefix of its longer code."""
    every = model_of("quantized").encode_all(images())
    assert not torch.equal(every[0], every[3][:, :4])


def test_encode_accepts_criterion_as_text_parsed_or_default():
    """A criterion as text, the same one parsed and the config's default give the same result."""
    model = lively(dataclasses.replace(TINY, criterion=thresholds("quantized", "l1")))
    text = model.encode(images(), model.config.criterion)
    same(text, model.encode(images(), parse(model.config.criterion)))
    same(text, model.encode(images()))


# ---------------------------------------------------------------- each image as if alone


def rows_of(encoded: Encoded, order: list[int]) -> list[tuple]:
    """Per image, under its own number: length, satisfied, tokens, trace."""
    tokens = encoded.split()
    found = [
        (image, int(encoded.num_tokens[i]), bool(encoded.satisfied[i]), tokens[i], encoded.trace[i])
        for i, image in enumerate(order)
    ]
    return sorted(found, key=lambda row: row[0])


@pytest.mark.parametrize("name", STRICTEST)
@pytest.mark.parametrize("model_name", CONFIGS)
def test_encode_is_independent_of_the_batch(model_name, name):
    """An image gets the same length, tokens and trace in every batch and at every position."""
    model, spec = model_of(model_name), thresholds(model_name, name)
    threshold = float(spec.split(":")[1])
    alone = [rows_of(model.encode(images()[i : i + 1], spec), [i])[0] for i in range(7)]
    for order in ([0, 1, 2], [5, 3, 4], [*range(7)], [6, 2, 0, 5, 1, 4, 3], [1, 1, 4]):
        for row in rows_of(model.encode(images()[order], spec), order):
            image, length, satisfied, tokens, trace = alone[row[0]]
            if ((trace - threshold).abs() < NEAR_TIE).any():
                continue
            assert row[:3] == (image, length, satisfied)
            torch.testing.assert_close(row[3], tokens, rtol=0, atol=1e-5)
            torch.testing.assert_close(row[4], trace, rtol=0, atol=1e-4, equal_nan=True)


def test_images_of_this_file_rarely_score_near_thresholds():
    """At most a tenth of the comparisons in this file are skipped because a score lies near its threshold."""
    ties = 0
    for model_name in CONFIGS:
        for name in STRICTEST:
            spec = thresholds(model_name, name)
            trace = model_of(model_name).encode(images(), spec).trace
            ties += int(((trace - float(spec.split(":")[1])).abs() < NEAR_TIE).any(1).sum())
    assert ties <= 0.1 * 7 * len(CONFIGS) * len(STRICTEST)


@pytest.mark.parametrize("model_name", ["deterministic", "sampled"])
def test_halting_changes_codes_reproducibly(model_name):
    """Halting changes the codes after the first iteration, identically for every model of the config."""
    halting, off = model_of(model_name).encode_all(images()), model_of("quantized").encode_all(images())
    assert torch.equal(halting[0], off[0])
    assert not torch.equal(halting[3], off[3])
    for ids, again in zip(halting, lively(CONFIGS[model_name]).encode_all(images()), strict=True):
        assert torch.equal(ids, again)


def test_sampled_halting_follows_its_seed():
    """Another halting seed changes the codes of later iterations but not those of the first."""
    ours = model_of("sampled").encode_all(images())
    others = [lively(dataclasses.replace(SAMPLED, halting_seed=seed)).encode_all(images()) for seed in range(1, 6)]
    assert all(torch.equal(other[0], ours[0]) for other in others), "nothing halts before the first iteration"
    assert not all(torch.equal(other[3], ours[3]) for other in others)


def test_empty_batch_gives_empty_results():
    """`encode`, `encode_all` and `decode` return empty results for an empty batch."""
    model = model_of("quantized")
    for spec in (*STRICTEST.values(), "fixed:8"):
        encoded = model.encode(images()[:0], spec)
        assert len(encoded) == len(encoded.tokens) == len(encoded.trace) == 0
        assert encoded.split() in ((), (torch.zeros(0, dtype=torch.int64),))
    assert [len(ids) for ids in model.encode_all(images()[:0])] == [0] * 4
    assert model.decode([]).shape == (0, 3, 16, 16)


# ---------------------------------------------------------------- no more work than needed


@dataclasses.dataclass
class Work:
    """Rows that each part was called with, one entry per call."""

    encoder: list[int]
    latent_decoder: list[int]
    pixel_decoder: list[int]


@pytest.fixture
def work(monkeypatch) -> Callable[[Alit], Work]:
    def watch(model: Alit) -> Work:
        found = Work([], [], [])

        def counted(function: Callable[[Tensor], Tensor], calls: list[int]) -> Callable[[Tensor], Tensor]:
            return lambda x: (calls.append(len(x)), function(x))[1]

        monkeypatch.setattr(model.encoder, "iterate", counted(model.encoder.iterate, found.encoder))
        monkeypatch.setattr(model.decoder, "forward", counted(model.decoder.forward, found.latent_decoder))
        monkeypatch.setattr(model.base, "decode", counted(model.base.decode, found.pixel_decoder))
        return found

    return watch


def still_active(encoded: Encoded) -> list[int]:
    """How many images each iteration had to run on: those that need at least its length."""
    return [count for n in TINY.lengths if (count := int((encoded.num_tokens >= n).sum()))]


@pytest.mark.parametrize("model_name", ["quantized", "continuous"])
@pytest.mark.parametrize("length", TINY.lengths)
def test_encode_fixed_runs_only_the_iterations_needed(work, model_name, length):
    """`fixed:N` runs no decoder, and no iteration beyond length N."""
    model = model_of(model_name)
    found = work(model)
    model.encode(images(), f"fixed:{length}")
    assert found == Work([7] * (length // 4), [], [])


@pytest.mark.parametrize("model_name", CONFIGS)
@pytest.mark.parametrize("name", ["code", "latent"])
def test_encode_latent_criteria_skip_the_pixel_decoder(work, model_name, name):
    """The criteria `code` and `latent` run the latent decoder on active images and never the pixel decoder."""
    model, spec = model_of(model_name), thresholds(model_name, name)
    found = work(model)
    active = still_active(model.encode(images(), spec))
    assert found == Work(active, active, [])


@pytest.mark.parametrize("model_name", CONFIGS)
@pytest.mark.parametrize("name", PIXELS)
def test_encode_pixel_criteria_decode_active_images_once(work, model_name, name):
    """Pixel criteria run each decoder once per iteration, on the images still active."""
    model, spec = model_of(model_name), thresholds(model_name, name)
    found = work(model)
    active = still_active(model.encode(images(), spec))
    assert found == Work(active, active, active)


def test_encode_stops_after_one_iteration_if_all_satisfied(work):
    """A batch whose images are all satisfied at the shortest length costs one iteration."""
    model = model_of("quantized")
    found = work(model)
    model.encode(images(), "l1:1")
    assert found == Work([7], [7], [7])


@pytest.mark.parametrize("model_name", ["deterministic", "sampled"])
def test_halting_runs_latent_decoder_between_iterations(work, model_name):
    """Halting runs the latent decoder between iterations and not after the last one."""
    model = model_of(model_name)
    found = work(model)
    model.encode(images(), "fixed:16")
    assert found.encoder == [7] * 4
    assert found.latent_decoder == [7] * 3  # nothing follows the last iteration
    assert found.pixel_decoder == []


def test_encode_user_function_receives_active_images_only():
    """A user's criterion function receives only the images still active, with their base tokens and reconstructions."""
    seen: list[Tensor] = []

    def measure(candidate: Candidate) -> Tensor:
        seen.append(candidate.images)
        assert len(candidate.base.latents_BDhw) == len(candidate.reconstructions) == len(candidate.images)
        return (candidate.images - candidate.reconstructions).abs().mean((1, 2, 3))

    spec = thresholds("quantized", "l1")
    encoded = model_of("quantized").encode(
        images(), Criterion(spec="mine", threshold=float(spec.split(":")[1]), measure=measure)
    )
    same(encoded, model_of("quantized").encode(images(), spec), atol=1e-6)
    for length, given in zip(TINY.lengths, seen, strict=False):
        assert torch.equal(given, images()[encoded.num_tokens >= length])


# ---------------------------------------------------------------- several batches together


def batches(*sizes: int) -> list[Tensor]:
    """The seven images over and over."""
    return list((images()[torch.arange(sum(sizes)) % 7]).split(sizes))


@pytest.mark.parametrize("batch_size", [1, 8, 100])
@pytest.mark.parametrize(
    ("model_name", "name"),
    [(model_name, name) for model_name in CONFIGS for name in ("l1", "psnr", "code", "latent")]
    + [("kl", "l1"), ("kl", "latent")],
)
def test_encode_batches_agrees_with_encode(model_name, name, batch_size):
    """`encode_batches` returns for every batch what `encode` returns for it alone, and the same result every time."""
    model, spec = model_of(model_name), thresholds(model_name, name)
    given = batches(0, 5, 1, 0, 9, 2, 3, 0)
    together = list(model.encode_batches(given, spec, batch_size))
    assert len(together) == len(given)
    for one, batch in zip(together, given, strict=True):
        same(one, model.encode(batch, spec), atol=1e-4 if name == "psnr" else 1e-5)
    for one, again in zip(together, model.encode_batches(given, spec, batch_size), strict=True):
        same(one, again)


@pytest.mark.parametrize("model_name", [*CONFIGS, "kl"])
@pytest.mark.parametrize("length", TINY.lengths)
def test_encode_batches_fixed_agrees_with_encode(model_name, length):
    """`encode_batches` with `fixed:N` returns for every batch what `encode` returns for it alone."""
    model, given = model_of(model_name), batches(3, 0, 6)
    for one, batch in zip(model.encode_batches(given, f"fixed:{length}", 4), given, strict=True):
        same(one, model.encode(batch, f"fixed:{length}"), atol=1e-5)


def test_encode_batches_accepts_none_and_empty_batches():
    """`encode_batches` returns no result for no batches, and an empty result for an empty batch."""
    model = model_of("quantized")
    assert list(model.encode_batches([])) == []
    assert [len(encoded) for encoded in model.encode_batches(batches(0, 0), "l1:0")] == [0, 0]
    same(next(model.encode_batches(batches(0))), model.encode(images()[:0]))


@pytest.mark.parametrize("model_name", ["quantized", "sampled"])
def test_encode_batches_fills_slices_of_late_iterations(work, monkeypatch, model_name):
    """Late iterations of small batches run on full slices, with less than 0.7 times the encoder calls."""
    model, spec = model_of(model_name), thresholds(model_name, "l1")
    given = batches(*[4] * 16)
    alone = [still_active(model.encode(batch, spec)) for batch in given]
    needed = [sum(rows[k] for rows in alone if len(rows) > k) for k in range(4)]
    assert needed[0] == 64
    assert needed[3] >= 8
    found, slices, base_rows, encode = work(model), [[] for _ in range(4)], [], model.base.encode
    iterate = model.encoder.iterate

    def watched(x_BSD: Tensor) -> Tensor:
        slices[(x_BSD.shape[1] - 1 - 64) // 4 - 1].append(len(x_BSD))
        return iterate(x_BSD)

    monkeypatch.setattr(model.encoder, "iterate", watched)
    monkeypatch.setattr(model.base, "encode", lambda x: (base_rows.append(len(x)), encode(x))[1])
    encoded = list(model.encode_batches(given, spec, 8))
    assert [still_active(one) for one in encoded] == alone
    assert slices == [[8] * (rows // 8) + ([rows % 8] if rows % 8 else []) for rows in needed]
    assert base_rows == [8] * 8
    assert found.encoder == found.latent_decoder == found.pixel_decoder
    assert len(found.encoder) < 0.7 * sum(map(len, alone))


def test_encode_batches_fixed_runs_no_decoder(work):
    """`encode_batches` with `fixed:N` runs no decoder, and no iteration beyond length N."""
    model = model_of("quantized")
    found = work(model)
    list(model.encode_batches(batches(4, 4, 4, 4, 3), "fixed:12", 8))
    assert found == Work([8] * 6 + [3] * 3, [], [])


def test_encode_batches_is_lazy_and_leaks_no_inference_mode():
    """`encode_batches` yields a complete batch before it pulls the next one, and never yields in inference mode."""
    pulled = []

    def source() -> Iterator[Tensor]:
        for batch in batches(2, 2, 2):
            assert not torch.is_inference_mode_enabled()
            pulled.append(len(batch))
            yield batch

    stream = model_of("quantized").encode_batches(source(), "fixed:8")
    assert pulled == []
    for count, encoded in enumerate(stream, 1):
        assert not torch.is_inference_mode_enabled()
        assert (len(encoded), len(pulled)) == (2, count)


@pytest.mark.unchecked
def test_encode_batches_rejects_invalid_arguments():
    """`encode_batches` rejects an invalid batch size or criterion at once, and invalid images when it pulls them."""
    model = model_of("quantized")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.encode_batches([], batch_size=0)
    with pytest.raises(CriterionError, match="fixed:5"):
        model.encode_batches([], "fixed:5")
    stream = model.encode_batches([images(), images()[:, :2]], "fixed:4")
    assert len(next(stream)) == 7
    with pytest.raises(ValueError, match=r"images must have the shape \(batch, 3, 16, 16\), got \(7, 2, 16, 16\)"):
        next(stream)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("model_name", CONFIGS)
def test_decode_mixed_lengths_agrees_with_each_alone(model_name):
    """`decode` gives images of mixed lengths the pixels that each gets alone."""
    model = model_of(model_name)
    every = model.encode_all(images())
    rows = [every[i % 4][i] for i in range(7)]
    together = model.decode(rows)
    assert together.shape == (7, 3, 16, 16)
    for row, image in zip(rows, together, strict=True):
        torch.testing.assert_close(model.decode([row])[0], image, rtol=0, atol=1e-5)


def test_decode_returns_the_scored_reconstruction_clamped():
    """`decode` returns the reconstruction that the criterion scored, clamped to 0..1."""
    model = model_of("quantized")
    encoded = model.encode(images(), "l1:0")
    ids = torch.stack(encoded.split())
    with torch.no_grad():
        unclamped = model.reconstruct(model.to_codes(ids))
    torch.testing.assert_close(model.decode(ids), unclamped.clamp(0, 1), rtol=0, atol=1e-6)
    l1 = (unclamped - images()).abs().mean((1, 2, 3))
    torch.testing.assert_close(encoded.score, l1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_decode_accepts_tensors_arrays_and_lists(dtype):
    """`decode` returns the same pixels for ids in a tensor, in NumPy arrays and in lists."""
    model = model_of("quantized")
    ids = model.encode_all(images())[1]
    expected = model.decode(ids)
    assert torch.equal(model.decode([row.numpy().astype(dtype) for row in ids]), expected)
    assert torch.equal(model.decode(ids.tolist()), expected)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0] * 5, r"image 1: this model decodes 4, 8, 12, 16 tokens, got the shape \(5,\)"),
        ([], r"this model decodes 4, 8, 12, 16 tokens, got the shape \(0,\)"),
        ([0] * 20, r"got the shape \(20,\)"),
        ([[0] * 4], r"got the shape \(1, 4\)"),
        ([0, 1, 64, 2], "image 1: ids must lie from 0 to 63, got 0 to 64"),
        ([0, -1, 3, 2], "image 1: ids must lie from 0 to 63, got -1 to 3"),
        ([0.0, 1.5, 2.0, 3.0], r"image 1: ids must be whole numbers, got torch\.float32"),
    ],
)
@pytest.mark.unchecked
def test_decode_rejects_invalid_ids(row, expected):
    """`decode` rejects ids of the wrong shape, range or type with the index of the image."""
    with pytest.raises(ValueError, match=expected):
        model_of("quantized").decode([[0, 1, 2, 3], row])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 6), r"image 0: this model decodes 4, 8, 12, 16 tokens, got the shape \(5, 6\)"),
        ((4,), r"got the shape \(4,\)"),
        ((4, 5), "image 0: codes must be 6 wide, got 5"),
    ],
)
def test_decode_rejects_codes_of_wrong_shape(shape, expected):
    """`decode` rejects continuous codes of the wrong shape."""
    with pytest.raises(ValueError, match=expected):
        model_of("continuous").decode([torch.zeros(shape)])


def test_continuous_latents_encode_to_codes_and_decode():
    """A model without a codebook encodes images to float32 codes, and decodes these to their reconstructions."""
    model = model_of("continuous")
    encoded = model.encode(images(), thresholds("continuous", "l1"))
    assert encoded.tokens.dtype == torch.float32
    assert encoded.tokens.shape == (encoded.num_tokens.sum(), 6)
    decoded = model.decode(encoded.split())
    torch.testing.assert_close((model.decode(encoded.split()[:1])), decoded[:1], rtol=0, atol=1e-5)
    with torch.no_grad():
        reconstructions = [model.reconstruct(codes[None])[0].clamp(0, 1) for codes in encoded.split()]
    torch.testing.assert_close(decoded, torch.stack(reconstructions), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("model_name", CONFIGS)
def test_attention_maps_sum_to_one_over_base_grid(model_name):
    """The attention map of each token is nonnegative and sums to one over the base grid."""
    maps = model_of(model_name).attention_maps(images_u8())
    assert [tuple(m.shape) for m in maps] == [(7, n, 8, 8) for n in TINY.lengths]
    for m in maps:
        assert (m >= 0).all()
        torch.testing.assert_close(m.sum((2, 3)), torch.ones(m.shape[:2]))


@pytest.mark.parametrize("model_name", ["quantized", "deterministic", "sampled"])
def test_attention_maps_follow_the_same_rollout(model_name, monkeypatch):
    """`attention_maps` computes the same latents as `rollout`."""
    model, seen = model_of(model_name), []
    expected = [step.latents_BND for step in model.rollout(images())]
    attend = model.encoder.attention

    def watched(x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        out = attend(x_BSD)
        seen.append(model.encoder.latents(out[0]))
        return out

    monkeypatch.setattr(model.encoder, "attention", watched)
    model.attention_maps(images())
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


# ---------------------------------------------------------------- no side effects


def everything(model: Alit) -> list[Tensor]:
    encoded = model.encode(images(), "l1:0.2")
    tokens = encoded.split()
    return [
        encoded.tokens,
        encoded.trace,
        *(one.trace for one in model.encode_batches(batches(3, 4), "l1:0.2", 2)),
        *model.encode_all(images()),
        model.decode(tokens),
        *model.attention_maps(images()),
    ]


@pytest.mark.parametrize("model_name", CONFIGS)
def test_inference_uses_no_gradients_or_random_numbers(model_name):
    """Inference records no gradients and leaves the global random state as it was."""
    model, before = model_of(model_name), torch.get_rng_state()
    outputs = everything(model)
    assert not any(tensor.requires_grad for tensor in outputs)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("model_name", CONFIGS)
def test_inference_is_repeatable_in_either_mode(model_name):
    """Inference gives identical results when repeated and in training mode."""
    model = model_of(model_name)
    first, training = everything(model), everything(copy.deepcopy(model).train())
    for one, other, again in zip(first, training, everything(model), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(one, again, rtol=0, atol=0, equal_nan=True)


def test_encode_changes_neither_weights_nor_input():
    """`encode` changes neither the model's weights nor its input."""
    model, given = model_of("sampled"), images()
    before = copy.deepcopy(model.state_dict())
    model.encode(given, "l1:0.2")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(given, images())


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_encode_agrees_for_uint8_and_float_images(dtype):
    """`encode` gives the same result for an image in uint8 and in floats."""
    model, spec = model_of("quantized"), thresholds("quantized", "l1")
    same(model.encode(images_u8(), spec), model.encode(images_u8().to(dtype) / 255, spec), atol=1e-6)


@pytest.mark.unchecked
@pytest.mark.parametrize("method", ["encode", "encode_all", "attention_maps"])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 3, 16, 17), (1, 3, 8, 8), (2, 1, 16, 16), (1, 16, 16, 3)])
def test_inference_rejects_images_of_wrong_shape(method, shape):
    """Inference rejects images of the wrong shape and names that shape."""
    with pytest.raises(ValueError, match=r"images must have the shape \(batch, 3, 16, 16\), got ") as error:
        getattr(model_of("quantized"), method)(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.unchecked
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_encode_rejects_images_of_wrong_type(dtype):
    """`encode` rejects images that are neither uint8 nor floats."""
    with pytest.raises(ValueError, match=rf"images must be uint8 or floats in \[0, 1\], got {dtype}"):
        model_of("quantized").encode(torch.zeros(1, 3, 16, 16, dtype=dtype))


@pytest.mark.parametrize("spec", ["fixed:5", "lpips:0.5", "l1"])
def test_encode_rejects_unsupported_criterion(spec):
    """`encode` rejects a criterion that the model does not support."""
    with pytest.raises(CriterionError, match=repr(spec)):
        model_of("quantized").encode(images(), spec)


# ---------------------------------------------------------------- the differentiable path


@pytest.mark.parametrize("config", [TINY, CONTINUOUS, dataclasses.replace(DETERMINISTIC, halting_threshold=0.02)])
def test_rollout_gives_gradients_to_all_trained_parts(config):
    """The outputs of `rollout` give nonzero gradients to every parameter that the config trains."""
    model = lively(config)
    steps = list(model.rollout(images(), predict=range(4)))
    loss = sum(step.predictions_BGO.square().mean() + step.quantizer_loss for step in steps)
    loss.backward()
    parts = {"encoder": model.encoder, "decoder": model.decoder}
    if model.codebook is not None:
        parts["codebook"] = model.codebook
    idle = {
        f"{part}.{name}"
        for part, module in parts.items()
        for name, p in module.named_parameters()
        if p.grad is None or not p.grad.abs().sum() > 0
    }
    assert idle == (set() if config.halting != "off" else {"encoder.mask_token"})  # only halting masks anything


def test_rollout_predicts_and_stops_as_requested():
    """`rollout` makes predictions at the requested iterations only, and stops after the requested number."""
    steps = list(model_of("quantized").rollout(images(), iterations=3, predict=[1]))
    assert [step.predictions_BGO is not None for step in steps] == [False, True, False]
    assert [step.codes_BNC.shape[1] for step in steps] == [4, 8, 12]


def test_rollout_at_strength_zero_keeps_unit_codes():
    """`rollout` at strength zero returns the normalized codes without quantization."""
    for step in model_of("quantized").rollout(images(), strength=0.0):
        unit = nn.functional.normalize(step.unquantized_BNC, dim=-1)
        torch.testing.assert_close(step.codes_BNC, unit)


def test_encode_each_agrees_with_encode_of_each_image() -> None:
    """`encode_each` returns as early as possible what `encode` gives each image under its own criterion and limit."""
    torch.manual_seed(0)
    model = Alit(TINY).eval()
    images = torch.rand(9, 3, 16, 16)
    trace = model.encode(images, "l1:0").trace
    middle, high = trace[:, 1].median().item(), trace.max().item()
    specs = [
        f"l1:{middle}",
        "fixed:8",
        "fixed:16",
        f"l1:{high}",
        "code:0.5",
        f"l1:{middle}",
        "latent:0",
        "psnr:100",
        "mse:1",
    ]
    criteria = [parse(spec) for spec in specs]
    most = [None, None, None, None, None, 8, None, 4, None]
    found: dict[int, Any] = {}
    rounds = 0
    for done in model.encode_each(images, criteria, most):
        rounds += 1
        for number, answer in done:
            assert number not in found
            assert len(answer.tokens) == 4 * rounds, "an image is answered in the round in which it is done"
            found[number] = answer
    assert sorted(found) == list(range(9))
    for number, (criterion, limit) in enumerate(zip(criteria, most, strict=True)):
        alone = model.encode(images[number : number + 1], criterion)
        answer = found[number]
        if limit is not None and limit < int(alone.num_tokens):
            assert len(answer.tokens) == limit
            assert not answer.satisfied
            assert answer.tokens.equal(model.encode(images[number : number + 1], f"fixed:{limit}").tokens)
            continue
        assert answer.tokens.equal(alone.tokens), criterion.spec
        assert answer.satisfied == bool(alone.satisfied)
        assert answer.trace == pytest.approx(alone.trace[0, : int(alone.tried)].tolist(), abs=1e-5)
    assert list(model.encode_each(images[:0], [])) == []
    with pytest.raises(ValueError, match="this model gives 4, 8, 12, 16 tokens, not 5"):
        model.encode_each(images[:1], [criteria[0]], [5])
    with pytest.raises(CriterionError, match="fixed:7"):
        model.encode_each(images[:1], [parse("fixed:7")])
