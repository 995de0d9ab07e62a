"""Hyperparameters are checked, and every preset has a recipe for each stage."""

from __future__ import annotations

import pytest

from alit.errors import ConfigError
from alit.model.presets import PRESETS
from alit.training.recipes import RECIPES, Recipe, recipe_from


def test_learning_rate_warms_up_and_falls_to_zero():
    """The learning rate rises during the warm-up, and then falls to zero at the last step."""
    recipe = Recipe(steps=100, warmup=10)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[:9] == sorted(rates[:9])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number from 0, got nan"),
        ({"ema": 1.0}, "ema must lie from 0 to below 1"),
        ({"sharding": "zero"}, "sharding must be ddp or fsdp, got 'zero'"),
        ({"steps": "many"}, "steps must be int, got 'many'"),
        ({"bf16": 1}, "bf16 must be bool, got 1"),
        ({"grad_iterations": 0}, "grad_iterations must be at least 1, got 0"),
        ({"gan_weight": 0.1}, "a recipe for distill has no field 'gan_weight'; it has steps"),
    ],
)
@pytest.mark.unchecked
def test_recipe_refuses_impossible_values(changes, sentence):
    """A field that is unknown, of another type or out of range is refused with the value."""
    with pytest.raises(ConfigError, match=sentence):
        recipe_from("distill", "nano", changes)


@pytest.mark.parametrize("stage", list(RECIPES))
def test_every_preset_has_recipes_for_every_stage(stage):
    """Every model preset has a recipe for every stage, whose fields can be changed."""
    assert all(isinstance(recipe_from(stage, preset), RECIPES[stage]) for preset in PRESETS)
    assert recipe_from(stage, "nano", {"steps": 7, "learning_rate": 1}).learning_rate == 1.0
