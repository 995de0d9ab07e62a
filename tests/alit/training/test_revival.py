"""Codes that are rarely chosen are replaced with vectors of the batch."""

from __future__ import annotations

import pytest
import torch
from small_trainers import common, images_u8, losses_of, trainer_of

from alit.training.recipes import BaseRecipe
from alit.training.revival import CodeRevival

pytestmark = pytest.mark.numeric


def test_revival_replaces_unused_codes():
    """Codes that are never chosen are replaced with vectors of the batch, when they are due and not before."""
    codebook, vectors = torch.zeros(16, 3), torch.arange(1, 31.0).view(10, 3)
    revival, generator = CodeRevival(16, every=5), torch.Generator().manual_seed(0)
    for step in range(5):
        assert not codebook.any(), "not before its time"
        revival.observe(torch.zeros(10, dtype=torch.long), vectors)
        revival.revive(codebook, step, generator)
    assert not codebook[0].any(), "a code in use stays"
    assert all((vectors == row).all(1).any() for row in codebook[1:])
    assert (revival.usage[1:] == 1 / 16).all(), "and gets time to prove itself"


def test_revival_keeps_codes_in_use():
    """A codebook of which every code is in use does not change."""
    codebook = torch.rand(16, 3, generator=torch.Generator().manual_seed(1))
    before = codebook.clone()
    revival = CodeRevival(16, every=10)
    for step in range(30):
        revival.observe(torch.arange(16), torch.zeros(16, 3))
        revival.revive(codebook, step, torch.Generator().manual_seed(0))
    assert torch.equal(codebook, before)


def test_later_revivals_replace_a_few_codes():
    """After the first revival, a sixteenth of the codes at most is replaced at once."""
    codebook = torch.zeros(32, 3)
    revival = CodeRevival(32, every=5)
    revival.observe(torch.zeros(4, dtype=torch.long), torch.ones(4, 3))
    revival.revive(codebook, 9, torch.Generator().manual_seed(0))
    assert codebook.any(1).sum() == 2


def test_training_revives_the_codebook_of_a_base():
    """A base that uses a single code comes to use many in training."""
    trainer = trainer_of(BaseRecipe(quantize_from=0, learning_rate=1e-3, **common(steps=200)))
    with torch.no_grad():
        trainer.model.base.codebook.weight[1:] = 100.0  # nothing is near them
    used = trainer.model.base.encode(images_u8() / 255).ids_BG.unique()
    assert len(used) == 1
    losses_of(trainer, 45)
    assert len(trainer.model.base.encode(images_u8() / 255).ids_BG.unique()) > 8
