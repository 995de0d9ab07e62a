"""Alit agrees with a naive reference, independently of the batch, and does no more work than needed.

Shapes: B batch, N latents, C code width, G base tokens, D base latent width, h w base grid.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lively_models import (
    APART,
    CONFIGS,
    CONTINUOUS,
    DETERMINISTIC,
    PIXELS,
    STRICTEST,
    Work,
    close,
    images,
    images_u8,
    lively,
    model_of,
    same,
    still_active,
    thresholds,
)
from small_models import TINY
from torch import Tensor

from alit.encoding.criteria import Candidate, Criterion, parse
from alit.encoding.results import Encoded
from alit.errors import CriterionError
from alit.model.base import BaseTokens
from alit.tokenizer import Alit

pytestmark = pytest.mark.numeric


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


class Alone(NamedTuple):
    """One image at one length, computed alone."""

    image: Tensor  # [3, H, W]
    base: BaseTokens
    predictions_GO: Tensor
    reconstruction: Tensor  # [3, H, W]


@cache
@torch.no_grad()
def computed_alone(model_name: str) -> list[list[Alone]]:
    """Returns every image at every length."""
    model, rows = model_of(model_name), []
    for image in images():
        base = model.base.encode(image[None])
        codes = [model.to_codes(tokens_BN) for tokens_BN in model.encode_all(image[None])]
        rows.append([Alone(image, base, model.decoder(c)[0], model.reconstruct(c)[0]) for c in codes])
    return rows


def score_by_hand(model: Alit, name: str, alone: Alone) -> float:
    """Returns the score of one image at one length."""
    if name in PIXELS:
        x, y = alone.image.numpy(), alone.reconstruction.numpy()
        mse = ((x - y) ** 2).mean()
        if name == "ssim":
            return ssim_by_hand(x, y)
        return {"l1": np.abs(x - y).mean(), "mse": mse, "psnr": 10 * math.log10(1 / mse)}[name]
    if name == "code":
        return (alone.predictions_GO.argmax(-1) != alone.base.ids_BG[0]).double().mean().item()
    rows_VD = model.base.codebook.weight.detach()
    mean_GD = alone.predictions_GO.softmax(-1) @ rows_VD
    return ((mean_GD - rows_VD[alone.base.ids_BG[0]]) ** 2).mean().sqrt().item()


def reference(model_name: str, name: str) -> np.ndarray:
    """Returns the scores [B, K] of every image at every length, one by one."""
    model = model_of(model_name)
    return np.array([[score_by_hand(model, name, alone) for alone in row] for row in computed_alone(model_name)])


@pytest.mark.parametrize("name", STRICTEST)
@pytest.mark.parametrize("model_name", CONFIGS)
def test_encode_agrees_with_naive_reference(model_name, name):
    """`encode` chooses the length, tokens and trace that a naive scoring of every length gives."""
    model, spec = model_of(model_name), thresholds(model_name, name)
    scores, threshold = reference(model_name, name), float(spec.split(":")[1])
    good = scores >= threshold if name in ("psnr", "ssim") else scores <= threshold
    encoded, every = model.encode(images(), spec), model.encode_all(images())
    for i, row in enumerate(encoded.split()):
        k = int(good[i].argmax()) if good[i].any() else 3
        assert encoded.num_tokens[i] == TINY.lengths[k]
        assert encoded.satisfied[i] == good[i].any()
        assert encoded.tried[i] == k + 1
        torch.testing.assert_close(row, every[k][i], rtol=0, atol=1e-9)
        np.testing.assert_allclose(encoded.trace[i, : k + 1].numpy(), scores[i, : k + 1], rtol=3e-7, atol=1e-9)
        assert encoded.trace[i, k + 1 :].isnan().all()
        assert encoded.score[i] == encoded.trace[i, k]


@pytest.mark.parametrize("model_name", CONFIGS)
def test_images_of_this_file_stop_at_every_length(model_name):
    """The images of this file stop at every length, and some never satisfy their criterion."""
    found = [model_of(model_name).encode(images(), thresholds(model_name, name)) for name in STRICTEST]
    assert {int(n) for encoded in found for n in encoded.num_tokens} == {*TINY.lengths}
    assert {bool(s) for encoded in found for s in encoded.satisfied} == {True, False}
    assert any(len(set(encoded.num_tokens.tolist())) >= 3 for encoded in found)


def test_no_score_of_this_file_lies_near_its_threshold():
    """Every score is so far from the threshold of its criterion that rounding cannot satisfy it."""
    for model_name in CONFIGS:
        for name in STRICTEST:
            spec = thresholds(model_name, name)
            trace = model_of(model_name).encode(images(), spec).trace.double()
            assert not ((trace - float(spec.split(":")[1])).abs() < APART).any(), (model_name, name)


@pytest.mark.parametrize("model_name", CONFIGS)
@pytest.mark.parametrize("length", TINY.lengths)
def test_encode_fixed_returns_tokens_of_that_length(model_name, length):
    """`fixed:N` returns the same tokens as `encode_all` at length N."""
    model = model_of(model_name)
    encoded = model.encode(images(), f"fixed:{length}")
    expected = model.encode_all(images())[TINY.lengths.index(length)]
    torch.testing.assert_close(torch.stack(encoded.split()), expected, rtol=0, atol=1e-9)


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
    model = lively(dataclasses.replace(CONFIGS["quantized"], criterion=thresholds("quantized", "l1")))
    text = model.encode(images(), model.config.criterion)
    same(text, model.encode(images(), parse(model.config.criterion)))
    same(text, model.encode(images()))


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
    alone = [rows_of(model.encode(images()[i : i + 1], spec), [i])[0] for i in range(7)]
    for order in ([0, 1, 2], [5, 3, 4], [*range(7)], [6, 2, 0, 5, 1, 4, 3], [1, 1, 4]):
        for row in rows_of(model.encode(images()[order], spec), order):
            image, length, satisfied, tokens, trace = alone[row[0]]
            assert row[:3] == (image, length, satisfied)
            torch.testing.assert_close(row[3], tokens, rtol=0, atol=1e-9)
            torch.testing.assert_close(row[4], trace, rtol=3e-7, atol=1e-9, equal_nan=True)


def test_empty_batch_gives_empty_results():
    """`encode`, `encode_all` and `decode` return empty results for an empty batch."""
    model = model_of("quantized")
    for spec in (*STRICTEST.values(), "fixed:8"):
        encoded = model.encode(images()[:0], spec)
        assert len(encoded) == len(encoded.tokens) == len(encoded.trace) == 0
        assert encoded.split() in ((), (torch.zeros(0, dtype=torch.int64),))
    assert [len(ids) for ids in model.encode_all(images()[:0])] == [0] * 4
    assert model.decode([]).shape == (0, 3, 16, 16)


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
    close(encoded, model_of("quantized").encode(images(), spec))
    for length, inputs in zip(TINY.lengths, seen, strict=False):
        assert torch.equal(inputs, images()[encoded.num_tokens >= length])


def test_encode_each_agrees_with_encode_of_each_image() -> None:
    """`encode_each` returns as early as possible what `encode` gives each image under its own criterion and limit."""
    torch.manual_seed(0)
    model = Alit(TINY).double().eval()
    images = torch.rand(9, 3, 16, 16, dtype=torch.float64)
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
        assert answer.trace == pytest.approx(alone.trace[0, : int(alone.tried)].tolist(), rel=3e-7, abs=1e-9)
    assert list(model.encode_each(images[:0], [])) == []
    with pytest.raises(ValueError, match="this model gives 4, 8, 12, 16 tokens, not 5"):
        model.encode_each(images[:1], [criteria[0]], [5])
    with pytest.raises(CriterionError, match="fixed:7"):
        model.encode_each(images[:1], [parse("fixed:7")])


@pytest.mark.parametrize("model_name", CONFIGS)
def test_decode_mixed_lengths_agrees_with_each_alone(model_name):
    """`decode` gives images of mixed lengths the pixels that each gets alone."""
    model = model_of(model_name)
    every = model.encode_all(images())
    rows = [every[i % 4][i] for i in range(7)]
    together = model.decode(rows)
    assert together.shape == (7, 3, 16, 16)
    for row, image in zip(rows, together, strict=True):
        torch.testing.assert_close(model.decode([row])[0], image, rtol=0, atol=1e-9)


def test_decode_returns_the_scored_reconstruction_clamped():
    """`decode` returns the reconstruction that the criterion scored, clamped to 0..1."""
    model = model_of("quantized")
    encoded = model.encode(images(), "l1:0")
    ids = torch.stack(encoded.split())
    with torch.no_grad():
        unclamped = model.reconstruct(model.to_codes(ids))
    torch.testing.assert_close(model.decode(ids), unclamped.clamp(0, 1), rtol=0, atol=1e-9)
    l1 = (unclamped - images()).abs().mean((1, 2, 3))
    torch.testing.assert_close(encoded.score, l1.float(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_decode_accepts_tensors_arrays_and_lists(dtype):
    """`decode` returns the same pixels for ids in a tensor, in NumPy arrays and in lists."""
    model = model_of("quantized")
    ids = model.encode_all(images())[1]
    expected = model.decode(ids)
    assert torch.equal(model.decode([row.numpy().astype(dtype) for row in ids]), expected)
    assert torch.equal(model.decode(ids.tolist()), expected)


def test_continuous_latents_encode_to_codes_and_decode():
    """A model without a codebook encodes images to float32 codes, and decodes these to their reconstructions."""
    model = model_of("continuous")
    encoded = model.encode(images(), thresholds("continuous", "l1"))
    assert encoded.tokens.dtype == torch.float64
    assert Alit(CONTINUOUS).encode(images_u8(), "fixed:4").tokens.dtype == torch.float32
    assert encoded.tokens.shape == (encoded.num_tokens.sum(), 6)
    decoded = model.decode(encoded.split())
    torch.testing.assert_close(model.decode(encoded.split()[:1]), decoded[:1], rtol=0, atol=1e-9)
    with torch.no_grad():
        reconstructions = [model.reconstruct(codes[None])[0].clamp(0, 1) for codes in encoded.split()]
    torch.testing.assert_close(decoded, torch.stack(reconstructions), rtol=0, atol=1e-9)


def everything(model: Alit) -> list[Tensor]:
    """Returns the outputs of every inference method."""
    few = images()[:4]
    encoded = model.encode(few, "l1:0.2")
    return [
        encoded.tokens,
        encoded.trace,
        *(one.trace for one in model.encode_batches(few.split([1, 3]), "l1:0.2", 2)),
        *model.encode_all(few),
        model.decode(encoded.split()),
        *model.attention_maps(few),
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
    model, inputs = model_of("sampled"), images()
    before = copy.deepcopy(model.state_dict())
    model.encode(inputs, "l1:0.2")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(inputs, images())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_encode_agrees_for_uint8_and_float_images(dtype):
    """`encode` gives the same result for an image in uint8 and in floats."""
    model, spec = model_of("quantized"), thresholds("quantized", "l1")
    one, other = model.encode(images_u8(), spec), model.encode(images_u8().to(dtype) / 255, spec)
    assert torch.equal(one.tokens, other.tokens)
    torch.testing.assert_close(one.trace, other.trace, rtol=0, atol=1e-6, equal_nan=True)


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
