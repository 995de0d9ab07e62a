"""The discriminator and its part in the losses."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import TINY
from small_trainers import GAN, batch, common, images_u8, same_state, trainer_of
from torch import nn

from alit.training.adversarial import DiscriminatorPerLength, PatchDiscriminator, adaptive_weight
from alit.training.recipes import FinetuneRecipe

pytestmark = pytest.mark.numeric


def test_both_optimizers_step_on_schedule():
    """Model and discriminator have separate optimizers, and the discriminator trains from its first step on."""
    recipe = FinetuneRecipe(gan_from=3, **common(), **GAN)
    trainer = trainer_of(recipe, config=TINY)
    adversary = trainer.objective.adversary
    assert adversary is not None
    owned = [
        {id(p) for group in trainer.optimizers[name].param_groups for p in group["params"]}
        for name in ("model", "discriminator")
    ]
    assert not owned[0] & owned[1]
    assert owned[1] == {id(p) for p in adversary.discriminator.parameters()}
    moved = []
    for _ in range(6):
        model, discriminator = copy.deepcopy(trainer.model), copy.deepcopy(adversary.discriminator)
        trainer.train_step(batch())
        moved.append((not same_state(trainer.model, model), not same_state(adversary.discriminator, discriminator)))
    assert moved == [(True, False)] * 3 + [(True, True)] * 3


def test_generator_loss_spares_the_discriminator():
    """The generator's loss leaves no gradient in the discriminator."""
    recipe = FinetuneRecipe(gan_from=0, **common(), **GAN)
    trainer = trainer_of(recipe, config=TINY)
    adversary = trainer.objective.adversary
    assert adversary is not None
    losses = trainer.objective.losses(trainer.model, images_u8() / 255, 2, trainer.generator)
    losses.total.backward()
    assert all(p.grad is None for p in adversary.discriminator.parameters())
    adversary.discriminator_loss().backward()
    grads = [p.grad for p in adversary.discriminator.parameters()]
    assert all(grad is not None for grad in grads)


def test_discriminator_learns_to_recognize_noise():
    """A discriminator learns within 30 steps to separate images from noise."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(lengths=4, width=16, layers=2)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3)
    real = images_u8() / 255
    for step in range(30):
        fake = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        loss = (
            nn.functional.relu(1 - discriminator(real, 1)).mean()
            + nn.functional.relu(1 + discriminator(fake, 1)).mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert discriminator(real, 1).mean() > 0.5
    assert discriminator(fake, 1).mean() < -0.5


def test_discriminators_depend_on_the_length():
    """The logits depend on the length and on no other image of the batch."""
    torch.manual_seed(0)
    images = images_u8().double() / 255
    for discriminator in (PatchDiscriminator(4, width=8, layers=2), DiscriminatorPerLength(4, width=8, layers=2)):
        discriminator.double()
        assert not torch.equal(discriminator(images, 0), discriminator(images, 3))
        torch.testing.assert_close(discriminator(images[:1], 2), discriminator(images, 2)[:1], rtol=1e-10, atol=1e-12)
        assert not list(discriminator.buffers())


def test_adaptive_weight_balances_both_gradients():
    """The adaptive weight is the ratio of both gradients at the last layer."""
    layer = torch.ones(3, requires_grad=True)
    weight = adaptive_weight((layer * 6).sum(), (layer * 2).sum(), layer)
    assert float(weight) == pytest.approx(3, rel=1e-3)
