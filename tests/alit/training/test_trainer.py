"""A step of training, and the state that a checkpoint holds."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from small_models import TINY
from small_trainers import GAN, HALTING, batch, common, fresh, images_u8, losses_of, same_state, trainer_of
from torch import Tensor

from alit.errors import TrainingError
from alit.tokenizer import Alit
from alit.training.objectives import DistillObjective, Losses
from alit.training.recipes import RECIPES, BaseRecipe, DistillRecipe, FinetuneRecipe, Recipe
from alit.training.trainer import Trainer

pytestmark = pytest.mark.numeric


def test_accumulated_steps_equal_whole_steps():
    """Gradients that are accumulated over four parts of a batch train as the whole batch does."""

    def losses(accumulate: int, **changes: Any) -> list[float]:
        recipe = DistillRecipe(quantize_from=0, **common(accumulate=accumulate, **changes))
        trainer = trainer_of(recipe, config=TINY, dtype=torch.float64)
        assert trainer.objective.revival is not None
        trainer.objective.revival.every = 1000  # it sees another last part
        return losses_of(trainer, 2)

    assert losses(4, latent_weight=0.0) == pytest.approx(losses(1, latent_weight=0.0), rel=1e-9)
    assert losses(4) == pytest.approx(losses(1), rel=2e-2)  # each part is divided by its own spread of latents


def test_recomputed_activations_give_the_same_step():
    """Activation checkpointing does not change the losses."""
    kept = trainer_of(DistillRecipe(quantize_from=0, **common()), dtype=torch.float64)
    recomputed = trainer_of(DistillRecipe(quantize_from=0, **common(recompute=True)), dtype=torch.float64)
    assert losses_of(kept, 3) == pytest.approx(losses_of(recomputed, 3), rel=1e-10)


class Poisoned(DistillObjective):
    """An objective that fails at its second step."""

    def losses(self, model: Alit, images: Tensor, step: int, generator: torch.Generator) -> Losses:
        found = super().losses(model, images, step, generator)
        return found if step == 0 else found._replace(total=found.total * float("nan"))


def test_step_stops_at_a_loss_that_is_not_finite():
    """A loss of NaN raises before anything is updated, and the message names the images."""
    model, recipe = fresh(), DistillRecipe(**common())
    trainer = Trainer(model, Poisoned(model, recipe), recipe)
    trainer.train_step(batch())
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(TrainingError) as error:
        trainer.train_step(batch())
    assert "the loss at step 1 is nan; nothing was updated. The images were photo 0, photo 1" in str(error.value)
    after = trainer.state_dict()
    for part in ("model", "average"):
        assert all(torch.equal(after[part][name], tensor) for name, tensor in before[part].items())
    for index, state in after["optimizers"]["model"]["state"].items():
        earlier = before["optimizers"]["model"]["state"][index]
        assert all(torch.equal(tensor, earlier[name]) for name, tensor in state.items())
    assert after["step"] == 1


def test_averaged_model_decodes():
    """The averaged model differs from the first and the last weights, and encodes and decodes."""
    trainer = trainer_of(FinetuneRecipe(learning_rate=1e-2, **common()), config=TINY)
    start = copy.deepcopy(trainer.model)
    losses_of(trainer, 3)
    averaged = trainer.averaged_model()
    assert not same_state(averaged, trainer.model)
    assert not same_state(averaged, start)
    assert torch.equal(averaged.base.codebook.weight, trainer.model.base.codebook.weight)
    assert averaged.decode(averaged.encode(images_u8(), "fixed:4").split()).shape == (8, 3, 16, 16)


EVERYTHING: list[Recipe] = [
    BaseRecipe(quantize_from=2, **common(), **GAN),
    DistillRecipe(grad_iterations=2, pixel_weight=0.5, quantize_over=4, **common()),
    FinetuneRecipe(**common(), **GAN),
]
"""All that draws random numbers: iterations, pixels, halting, revivals; and both optimizers."""


def saved_and_loaded(trainer: Trainer) -> dict[str, Any]:
    """Returns a trainer's state as a checkpoint file holds it."""
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("recipe", EVERYTHING, ids=list(RECIPES))
def test_state_dict_resumes_bitwise(recipe):
    """A trainer with other initial values that loads a state trains on with the bits of the one that saved it."""
    one, other = trainer_of(recipe), trainer_of(recipe, seed=1)
    for trainer in (one, other):
        assert trainer.objective.revival is not None
        trainer.objective.revival.every, trainer.objective.revival.floor = 2, 0.5
    losses_of(one, 3)
    other.load_state_dict(saved_and_loaded(one))
    assert losses_of(one, 2) == losses_of(other, 2)
    assert other.step == one.step == 5
    first, second = one.state_dict(), other.state_dict()
    for part in ("model", "average", "discriminator", "revival"):
        assert all(torch.equal(first[part][name], tensor) for name, tensor in second[part].items()), part
    assert torch.equal(first["generator"], second["generator"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"code_dim": 8}, "the checkpoint's model has code_dim=6, this run asks for 8"),
        ({"iterations": 3}, "the checkpoint's model has iterations=4, this run asks for 3"),
        ({"halting": "off"}, "the checkpoint's model has halting='sampled', this run asks for 'off'"),
    ],
)
def test_load_state_dict_refuses_other_models(changes, expected):
    """The state of another model is refused with the field that differs, and nothing is loaded."""
    recipe = DistillRecipe(**common())
    trainer = trainer_of(recipe, config=dataclasses.replace(HALTING, **changes))
    before = copy.deepcopy(trainer.model)
    with pytest.raises(TrainingError, match=expected):
        trainer.load_state_dict(trainer_of(recipe, seed=1).state_dict())
    assert same_state(trainer.model, before)


def test_load_state_dict_refuses_other_recipes():
    """The state of another stage or of other hyperparameters is refused with what differs."""
    state = trainer_of(DistillRecipe(**common())).state_dict()
    with pytest.raises(TrainingError, match=r"learning_rate=0.001, this run asks for 0.5; use the same value, or name"):
        trainer_of(DistillRecipe(**common(learning_rate=0.5))).load_state_dict(state)
    with pytest.raises(TrainingError, match="the checkpoint is of a DistillRecipe, this run has a FinetuneRecipe"):
        trainer_of(FinetuneRecipe(**common())).load_state_dict(state)


def test_load_state_dict_accepts_more_steps():
    """A state is loaded with another number of steps, other intervals and another division into parts."""
    trainer = trainer_of(DistillRecipe(**common(steps=9, log_every=3, keep=5, accumulate=2)))
    trainer.load_state_dict(trainer_of(DistillRecipe(**common()), seed=1).state_dict())
    assert same_state(trainer.model, fresh(seed=1))
