"""The cost of a step is counted without computing it."""

from __future__ import annotations

import dataclasses

from small_models import TINY
from small_trainers import GAN, common, fresh

from alit.training.cost import cost
from alit.training.objectives import objective_for
from alit.training.recipes import DistillRecipe, FinetuneRecipe


def test_cost_counts_parameters_exactly():
    """The cost has the exact numbers of parameters, and more operations for a deeper model."""
    recipe = FinetuneRecipe(**common(), **GAN)
    config = dataclasses.replace(TINY, depth=1, iterations=2)
    model = fresh(config=config)
    objective = objective_for(model, recipe)
    found = cost(config, recipe)
    trained = sum(p.numel() for _, p in objective.trainable(model))
    assert found.trained == trained
    assert found.trained + found.frozen == sum(p.numel() for p in model.parameters())
    assert objective.adversary is not None
    assert found.discriminator == sum(p.numel() for p in objective.adversary.discriminator.parameters())
    assert found.activation_bytes > 16 * 16 * 3 * 4
    deeper = cost(dataclasses.replace(config, depth=2), recipe)
    assert deeper.flops > 1.2 * found.flops


def test_cost_counts_the_operations_of_a_transformer():
    """Forward and backward of a linear layer are 6 operations per weight and row; a transformer is mostly such."""
    recipe = DistillRecipe(quantize_from=0, **common())
    config = dataclasses.replace(TINY, width=64, depth=6, iterations=2)
    found = cost(config, recipe).flops
    rows = sum(1 + 64 + 4 * (k + 1) for k in range(2))  # of encoder and decoder alike
    blocks = 2 * 6 * rows * 12 * 64 * 64 * 6
    assert blocks < found < 2 * blocks
