"""The halting mask against its definition, the noise of sampled halting, and halting in a rollout."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lively_models import CONFIGS, SAMPLED, images, lively, model_of
from small_models import TINY

from alit.model.halting import fixed_noise, halting_mask

pytestmark = pytest.mark.numeric

MASKED = dataclasses.replace(TINY, halting="deterministic", halting_threshold=0.5)
NOISY = dataclasses.replace(TINY, halting="sampled", halting_threshold=0.5)
PROBABILITIES_BG = torch.tensor([[0.4, 0.5001, 0.7, 0.99]])
IDS_BG = torch.tensor([[0, 1, 0, 1]])


def predictions() -> torch.Tensor:
    """Logits over two codes that give the true code the probabilities above."""
    true_BG1, other_BG1 = PROBABILITIES_BG.log()[..., None], (1 - PROBABILITIES_BG).log()[..., None]
    return torch.where(IDS_BG[..., None] == torch.arange(2), true_BG1, other_BG1)


def test_tokens_halt_from_the_threshold_on() -> None:
    """Deterministic halting masks what is predicted at least as well as the threshold, and reads no noise."""
    mask = halting_mask(predictions(), IDS_BG, torch.empty(0), 0, MASKED)
    assert mask.tolist() == [[False, True, True, True]]


def test_sampled_halting_compares_probability_with_noise() -> None:
    """Sampled halting masks where the noise of this iteration, shared or per image, is below the probability."""
    shared = torch.stack([torch.zeros(4), torch.tensor([0.0, 0.6, 0.6, 0.98])])
    for noise in (shared, shared.unsqueeze(1)):
        assert halting_mask(predictions(), IDS_BG, noise, 0, NOISY).tolist() == [[False, True, True, True]]
        assert halting_mask(predictions(), IDS_BG, noise, 1, NOISY).tolist() == [[False, False, True, True]]


def test_the_mask_passes_no_gradients() -> None:
    """Predictions that require gradients give a mask without any."""
    mask = halting_mask(predictions().requires_grad_(), IDS_BG, torch.empty(0), 0, MASKED)
    assert mask.dtype == torch.bool
    assert not mask.requires_grad


def test_fixed_noise_depends_on_the_seed_alone() -> None:
    """The noise has one value per iteration and position, and does not touch the global random state."""
    before = torch.get_rng_state()
    noise = fixed_noise(NOISY)
    assert noise.shape == (TINY.iterations, TINY.grid**2)
    assert torch.equal(noise, fixed_noise(NOISY))
    assert not torch.equal(noise, fixed_noise(dataclasses.replace(NOISY, halting_seed=1)))
    assert fixed_noise(MASKED).shape == (0,)
    assert torch.equal(torch.get_rng_state(), before)


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


@pytest.mark.parametrize("model_name", ["deterministic", "sampled"])
def test_halting_runs_latent_decoder_between_iterations(work, model_name):
    """Halting runs the latent decoder between iterations and not after the last one."""
    model = model_of(model_name)
    found = work(model)
    model.encode(images(), "fixed:16")
    assert found.encoder == [7] * 4
    assert found.latent_decoder == [7] * 3  # nothing follows the last iteration
    assert found.pixel_decoder == []
