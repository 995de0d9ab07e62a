"""The halting mask against its definition, and the noise of sampled halting."""

import dataclasses

import torch
from small_models import TINY

from alit.model.halting import fixed_noise, halting_mask

DETERMINISTIC = dataclasses.replace(TINY, halting="deterministic", halting_threshold=0.5)
SAMPLED = dataclasses.replace(TINY, halting="sampled", halting_threshold=0.5)
PROBABILITIES_BG = torch.tensor([[0.4, 0.5001, 0.7, 0.99]])
IDS_BG = torch.tensor([[0, 1, 0, 1]])


def predictions() -> torch.Tensor:
    """Logits over two codes that give the true code the probabilities above."""
    true_BG1, other_BG1 = PROBABILITIES_BG.log()[..., None], (1 - PROBABILITIES_BG).log()[..., None]
    return torch.where(IDS_BG[..., None] == torch.arange(2), true_BG1, other_BG1)


def test_tokens_halt_from_the_threshold_on() -> None:
    """Deterministic halting masks what is predicted at least as well as the threshold, and reads no noise."""
    mask = halting_mask(predictions(), IDS_BG, torch.empty(0), 0, DETERMINISTIC)
    assert mask.tolist() == [[False, True, True, True]]


def test_sampled_halting_compares_probability_with_noise() -> None:
    """Sampled halting masks where the noise of this iteration, shared or per image, is below the probability."""
    shared = torch.stack([torch.zeros(4), torch.tensor([0.0, 0.6, 0.6, 0.98])])
    for noise in (shared, shared.unsqueeze(1)):
        assert halting_mask(predictions(), IDS_BG, noise, 0, SAMPLED).tolist() == [[False, True, True, True]]
        assert halting_mask(predictions(), IDS_BG, noise, 1, SAMPLED).tolist() == [[False, False, True, True]]


def test_the_mask_passes_no_gradients() -> None:
    """Predictions that require gradients give a mask without any."""
    mask = halting_mask(predictions().requires_grad_(), IDS_BG, torch.empty(0), 0, DETERMINISTIC)
    assert mask.dtype == torch.bool
    assert not mask.requires_grad


def test_fixed_noise_depends_on_the_seed_alone() -> None:
    """The noise has one value per iteration and position, and does not touch the global random state."""
    before = torch.get_rng_state()
    noise = fixed_noise(SAMPLED)
    assert noise.shape == (TINY.iterations, TINY.grid**2)
    assert torch.equal(noise, fixed_noise(SAMPLED))
    assert not torch.equal(noise, fixed_noise(dataclasses.replace(SAMPLED, halting_seed=1)))
    assert fixed_noise(DETERMINISTIC).shape == (0,)
    assert torch.equal(torch.get_rng_state(), before)
