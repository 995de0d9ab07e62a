"""Each stage trains its own parameters, and its losses fall."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from small_models import TINY
from small_trainers import GAN, batch, common, fresh, losses_of, same_state, trainer_of

from alit.metrics.lpips import Perceptual
from alit.model.config import KLConfig
from alit.tokenizer import Alit
from alit.training.objectives import DistillObjective, objective_for
from alit.training.recipes import BaseRecipe, DistillRecipe, FinetuneRecipe, Recipe
from alit.training.trainer import Trainer

pytestmark = pytest.mark.numeric

GOLDEN = {
    "base": [0.60969, 0.55232, 0.50495, 0.4685, 0.4524, 0.42026, 0.43863, 0.44074, 0.41651, 0.38958],
    "distill": [19.262, 16.221, 11.715, 10.978, 10.957, 10.94, 10.924, 19.068, 11.583, 16.972],
    "finetune": [0.63702, 0.54551, 0.49034, 0.44677, 0.38995, 0.37735, 0.34746, 0.32904, 0.30461, 0.29259],
}
"""Losses of the first ten steps, as this code gave them once (CPU, fp32, one thread)."""


def golden_recipe(stage: str) -> Recipe:
    """Returns the recipe of the golden losses of a stage."""
    changes = common(learning_rate=1e-3, steps=20)
    if stage == "base":
        return BaseRecipe(quantize_from=4, gan_from=6, **changes, **GAN)
    if stage == "distill":
        return DistillRecipe(
            grad_iterations=2, sample_depth=True, pixel_weight=0.5, quantize_from=3, quantize_over=4, **changes
        )
    return FinetuneRecipe(gan_from=5, **changes, **GAN)


@pytest.mark.parametrize("stage", list(GOLDEN))
def test_first_ten_losses_are_the_recorded_ones(stage):
    """The losses of the first ten steps of each stage are those of the record."""
    assert losses_of(trainer_of(golden_recipe(stage)), 10) == pytest.approx(GOLDEN[stage], rel=2e-3)


@pytest.mark.parametrize("quantize_from", [0, 300])
def test_base_learns_eight_images(quantize_from):
    """The loss of a discrete base falls by a third in 20 steps, with and without quantization."""
    losses = losses_of(trainer_of(BaseRecipe(quantize_from=quantize_from, learning_rate=3e-3, **common(steps=25))), 20)
    assert sum(losses[-3:]) / 3 < 0.7 * losses[0]


def test_kl_base_learns_eight_images():
    """The loss of a continuous base falls by a third in 20 steps."""
    config = dataclasses.replace(TINY, base=KLConfig(channels=(32, 32), blocks=1, latent_dim=4), codebook_size=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Alit(config)
    recipe = BaseRecipe(learning_rate=3e-3, **common(steps=25))
    losses = losses_of(Trainer(model, objective_for(model, recipe), recipe), 20)
    assert sum(losses[-3:]) / 3 < 0.7 * losses[0]


def test_distillation_learns_eight_images():
    """The loss of distillation falls, and the base does not change."""
    trainer = trainer_of(DistillRecipe(pixel_weight=0.5, quantize_from=0, learning_rate=3e-3, **common(steps=40)))
    before = copy.deepcopy(trainer.model)
    losses = losses_of(trainer, 35)
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]
    assert same_state(trainer.model.base, before.base)
    assert not same_state(trainer.model.encoder, before.encoder)


def test_finetuning_trains_each_length_in_turn():
    """Finetuning trains one length after the other, and all parameters but the base's codebook."""
    trainer = trainer_of(FinetuneRecipe(**common()), config=TINY)
    before = copy.deepcopy(trainer.model)
    names = [name for _ in range(5) for name in trainer.train_step(batch()) if name.startswith("l1_")]
    assert names == ["l1_0", "l1_1", "l1_2", "l1_3", "l1_0"]
    same = [
        n for (n, a), b in zip(trainer.model.named_parameters(), before.parameters(), strict=True) if torch.equal(a, b)
    ]
    assert same == ["base.codebook.weight", "encoder.mask_token"], "which nothing asks for without halting"


def test_base_objective_trains_the_base_only():
    """The stage of the base leaves encoder and decoder of the latents unchanged."""
    trainer = trainer_of(BaseRecipe(**common()))
    before = copy.deepcopy(trainer.model)
    losses_of(trainer, 1)
    assert same_state(trainer.model.encoder, before.encoder)
    assert same_state(trainer.model.decoder, before.decoder)
    assert not same_state(trainer.model.base, before.base)


def test_sampled_depth_reaches_every_depth():
    """A sampled depth ends at every iteration, and supervises no more iterations than the recipe says."""
    model = fresh()
    objective = DistillObjective(model, DistillRecipe(sample_depth=True, grad_iterations=2, **common()))
    generator = torch.Generator().manual_seed(0)
    chosen = [objective._supervised(4, generator) for _ in range(60)]
    assert {max(some) for some in chosen} == {0, 1, 2, 3}
    assert {len(some) for some in chosen} == {1, 2}


def test_lpips_is_neither_trained_nor_stored():
    """LPIPS counts in the loss, receives no gradients and is not part of a checkpoint."""
    config = dataclasses.replace(TINY, image_size=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        perceptual = Perceptual()
    model, recipe = fresh(config=config), FinetuneRecipe(**common())
    trainer = Trainer(model, objective_for(model, recipe, perceptual), recipe)
    numbers = trainer.train_step(batch())
    assert numbers["perceptual"] > 0
    assert not any("vgg" in name or "percept" in name for name in trainer.state_dict()["model"])
    assert all(p.grad is None for p in perceptual.parameters())
