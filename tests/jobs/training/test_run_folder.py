"""A run's folder: settings, log, images, rejects, checkpoints and weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import TINY
from small_trainers import (
    GAN,
    HALTING,
    batches,
    common,
    images_u8,
    trainer_of,
)

from alit.errors import TrainingError
from alit.training.loop import train
from alit.training.recipes import RECIPES, BaseRecipe, DistillRecipe, FinetuneRecipe, Recipe
from alit.training.trainer import Trainer, TrainingBatch
from alit.weights import load_weights
from jobs.storage.path import parse_uri
from jobs.training.checkpoints import Checkpoints
from jobs.training.events import Message
from jobs.training.run_folder import LOG, RunFolder, RunSettings


def settings(recipe: Recipe, **changes: Any) -> RunSettings:
    """Returns the settings of a run of this recipe."""
    stage = next(name for name, kind in RECIPES.items() if isinstance(recipe, kind))
    fields = {
        "stage": stage, "recipe": recipe, "preset": "nano", "data": "photos/", "validation": None, "init": None,
        "init_fingerprint": None, "criterion": None, "half": False, "photographs": 100,
    }  # fmt: skip
    return RunSettings(**fields | changes)


def run_of(folder: Path, recipe: Recipe, events: list[Any] | None = None, **changes: Any) -> RunFolder:
    """Returns the folder of a run; its events are appended to `events`."""
    on_event = (lambda event: None) if events is None else events.append
    validation_images = changes.pop("validation_images", None)
    return RunFolder(
        parse_uri(str(folder)), settings(recipe, **changes), validation_images=validation_images, on_event=on_event
    )


def checkpoint_of(folder: Path, recipe: Recipe) -> None:
    """Writes the checkpoint of a run before its first step."""
    trainer, run = trainer_of(recipe), run_of(folder, recipe)
    run.resume(trainer)
    run.checkpoint(trainer, None)


EVERYTHING: list[Recipe] = [
    BaseRecipe(quantize_from=2, **common(checkpoint_every=1), **GAN),
    DistillRecipe(grad_iterations=2, pixel_weight=0.5, quantize_over=4, **common(checkpoint_every=1)),
    FinetuneRecipe(**common(checkpoint_every=1), **GAN),
]
"""All that draws random numbers: iterations, pixels, halting, revivals; and both optimizers."""


def with_revivals(trainer: Trainer) -> Trainer:
    """Makes codes be replaced within the few steps of a test."""
    assert trainer.objective.revival is not None
    trainer.objective.revival.every, trainer.objective.revival.floor = 2, 0.5
    return trainer


@pytest.mark.parametrize("recipe", EVERYTHING, ids=list(RECIPES))
def test_run_resumes_bitwise_from_a_checkpoint(tmp_path, recipe):
    """A run that was killed and resumed ends with the bits of an uninterrupted one."""
    undisturbed = with_revivals(trainer_of(recipe))
    run = run_of(tmp_path / "whole", recipe)
    run.resume(undisturbed)
    train(undisturbed, batches(0), run)

    def killed() -> Iterator[TrainingBatch]:
        yield from islice(batches(0), 3)
        raise KeyboardInterrupt

    first, run = with_revivals(trainer_of(recipe)), run_of(tmp_path / "parts", recipe)
    run.resume(first)
    with pytest.raises(KeyboardInterrupt):
        train(first, killed(), run)
    assert first.step == 3
    with (tmp_path / "parts" / LOG).open("a") as log:
        log.write('{"step": 3, "los')  # as a kill in the middle of a line leaves it
    events: list[Any] = []
    resumed = with_revivals(trainer_of(recipe, seed=1))  # other initial weights: all must come from the checkpoint
    run = run_of(tmp_path / "parts", recipe, events)
    run.resume(resumed)
    assert Message(text="resuming at step 3") in events
    train(resumed, batches(resumed.step), run)
    assert resumed.step == undisturbed.step == 6
    one, two = resumed.state_dict(), undisturbed.state_dict()
    for part in ("model", "average", "discriminator", "revival"):
        assert all(torch.equal(one[part][name], tensor) for name, tensor in two[part].items()), part
    assert torch.equal(one["generator"], two["generator"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / LOG).read_text().splitlines()]
    assert steps == sorted(set(steps)), "no line twice"


def test_run_folder_holds_settings_log_and_weights(tmp_path):
    """A run writes its settings, a log, images, a TensorBoard log, a checkpoint with its score, and weights."""
    recipe = FinetuneRecipe(**common(log_every=2, validate_every=3, checkpoint_every=6))
    trainer, events = trainer_of(recipe, config=TINY), []
    run = run_of(tmp_path, recipe, events, validation_images=images_u8(), criterion="l1:0.2", half=True)
    run.resume(trainer)
    train(trainer, repeat(TrainingBatch(images_u8())), run)
    run.finish(trainer)
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 6]
    assert {"loss", "l1_0", "l1_1", "images_per_second", "waiting", "grad_norm", "learning_rate"} <= rows[0].keys()
    validated = rows[-1]
    assert {"val_l1_4", "val_psnr_8", "val_ssim_16", "perplexity"} <= validated.keys()
    assert sum(validated["chosen_lengths"]) == 8
    assert (tmp_path / "pictures" / "step-00000006.png").stat().st_size > 1000
    assert list((tmp_path / "tensorboard").iterdir())
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["steps"] == 6
    weights = load_weights(tmp_path / "weights")
    assert weights.model.config.criterion == "l1:0.2"
    assert weights.provenance["recipe"]["batch_size"] == 8
    saved = [saved.score for saved in Checkpoints(parse_uri(str(tmp_path / "checkpoints"))).list()]
    assert saved == [pytest.approx(sum(validated[f"val_l1_{n}"] for n in (4, 8, 12, 16)) / 4, abs=1e-5)]


def test_run_reports_undecodable_images_once(tmp_path):
    """Images that cannot be decoded are reported once and listed in a file."""
    recipe = BaseRecipe(**common(steps=3))
    trainer, events = trainer_of(recipe), []
    run = run_of(tmp_path, recipe, events)
    run.resume(trainer)
    bad = TrainingBatch(images_u8(), ["a"] * 8, [("b.jpg", "truncated", "the file ends too early")])
    train(trainer, run.without_rejects(iter([bad] * 3)), run)
    assert json.loads((tmp_path / "rejects.jsonl").read_text()) == {
        "id": "b.jpg", "reason": "truncated", "message": "the file ends too early",
    }  # fmt: skip
    assert sum(isinstance(event, Message) and "b.jpg" in event.text for event in events) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"code_dim": 8}, "the checkpoint's model has code_dim=6, this run asks for 8"),
        ({"iterations": 3}, "the checkpoint's model has iterations=4, this run asks for 3"),
        ({"halting": "off"}, "the checkpoint's model has halting='sampled', this run asks for 'off'"),
    ],
)
def test_run_refuses_checkpoints_of_other_models(tmp_path, changes, expected):
    """A checkpoint of another model is refused with the field that differs."""
    recipe = DistillRecipe(**common())
    checkpoint_of(tmp_path, recipe)
    with pytest.raises(TrainingError, match=expected):
        run_of(tmp_path, recipe).resume(trainer_of(recipe, config=dataclasses.replace(HALTING, **changes)))


def test_run_refuses_checkpoints_of_other_recipes(tmp_path):
    """A checkpoint of another recipe, stage or number of images is refused, and nothing is overwritten."""
    checkpoint_of(tmp_path, DistillRecipe(**common()))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    other = DistillRecipe(**common(learning_rate=0.5))
    with pytest.raises(TrainingError, match=r"learning_rate=0.001, this run asks for 0.5; use the same value, or name"):
        run_of(tmp_path, other).resume(trainer_of(other))
    stage = FinetuneRecipe(**common())
    with pytest.raises(TrainingError, match="the checkpoint is of a DistillRecipe, this run has a FinetuneRecipe"):
        run_of(tmp_path, stage).resume(trainer_of(stage))
    recipe = DistillRecipe(**common())
    with pytest.raises(TrainingError, match="was trained on 100 images, and now there are 99"):
        run_of(tmp_path, recipe, photographs=99).resume(trainer_of(recipe))
    assert {path: path.read_bytes() for path in before} == before, "nothing is overwritten"


def test_run_resumes_with_more_steps(tmp_path):
    """A run resumes with more steps and other intervals."""
    checkpoint_of(tmp_path, DistillRecipe(**common()))
    longer = DistillRecipe(**common(steps=9, log_every=3, keep=5, accumulate=2))
    trainer, events = trainer_of(longer), []
    run_of(tmp_path, longer, events).resume(trainer)
    assert Message(text="resuming at step 0") in events
