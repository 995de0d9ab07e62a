"""Local initial values of latent distillation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_trainers import HALTING, fresh, images_u8, same_state

from alit.tokenizer import Alit
from alit.training.initialization import initialize_locally

pytestmark = pytest.mark.numeric


def own_share(model: Alit) -> float:
    """Returns how often a latent's attention is centred in its own quarter of the image."""
    maps_BNgg = model.attention_maps(images_u8())[0]
    line = torch.arange(8) + 0.5
    centroids_BN2 = torch.stack([(maps_BNgg.sum(3) * line).sum(2), (maps_BNgg.sum(2) * line).sum(2)], dim=-1)
    middles = torch.tensor([[2.0, 2.0], [2.0, 6.0], [6.0, 2.0], [6.0, 6.0]])
    return (torch.cdist(centroids_BN2, middles).argmin(-1) == torch.arange(4)).float().mean().item()


def concentration(model: Alit) -> float:
    """Returns the mean share of attention that the latents of the first iteration pay to their own quarter."""
    maps_BNgg = model.attention_maps(images_u8())[0]
    quarters = maps_BNgg.unflatten(3, (2, 4)).unflatten(2, (2, 4)).sum((3, 5)).flatten(2)  # [B, N, 4]
    return quarters.diagonal(dim1=1, dim2=2).mean().item()


def test_initialize_locally_concentrates_attention():
    """Latents attend to their own part of the image from the start, unlike with the published values."""
    config = dataclasses.replace(HALTING, width=128, heads=4, halting="off")
    local, published = fresh(config=config), fresh(config=config)
    initialize_locally(local, torch.Generator().manual_seed(0))
    assert own_share(local) > 0.9
    assert own_share(published) < 0.7
    assert concentration(local) > 0.4
    assert concentration(published) == pytest.approx(0.25, abs=0.05)


def test_initialize_locally_follows_the_generator():
    """The same generator gives the same values, which are finite and can be trained."""
    one, two = fresh(), fresh()
    for model in (one, two):
        initialize_locally(model, torch.Generator().manual_seed(0))
    assert same_state(one, two)
    assert all(p.requires_grad and torch.isfinite(p).all() for p in one.parameters())
