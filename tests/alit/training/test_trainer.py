"""Training goes on exactly where it stopped, stops before it does harm, and its objectives fall."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import TINY as WITHOUT_HALTING
from torch import Tensor, nn

from alit.errors import ConfigError, TrainingError
from alit.metrics.lpips import Perceptual
from alit.model.config import AlitConfig, KLConfig
from alit.model.presets import PRESETS
from alit.tokenizer import Alit
from alit.training.adversarial import DiscriminatorPerLength, PatchDiscriminator, adaptive_weight
from alit.training.cost import cost
from alit.training.initialization import initialize_locally
from alit.training.loop import train
from alit.training.objectives import DistillObjective, Losses, objective_for
from alit.training.recipes import RECIPES, BaseRecipe, DistillRecipe, FinetuneRecipe, Recipe, recipe_from
from alit.training.revival import CodeRevival
from alit.training.trainer import Trainer, TrainingBatch
from alit.weights import load_weights
from jobs.storage.path import parse_uri
from jobs.training.checkpoints import Checkpoints
from jobs.training.events import Message
from jobs.training.run_folder import LOG, RunFolder, RunSettings

TINY = dataclasses.replace(WITHOUT_HALTING, halting="sampled", halting_threshold=0.03)
GAN = {"gan_weight": 0.3, "gan_ramp": 2, "discriminator_width": 8, "discriminator_layers": 2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, so that results are the same bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def images_u8(count: int = 8) -> Tensor:
    """Smooth images."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (255 * nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(0, 1)).to(torch.uint8)


@torch.no_grad()
def fresh(seed: int = 0, config: AlitConfig = TINY) -> Alit:
    """An untrained model, its base codebook among the latents of real images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Alit(config)
        latents = model.base.encode(images_u8() / 255).latents_BDhw.permute(0, 2, 3, 1).flatten(0, 2)
        model.base.codebook.weight.copy_(latents[torch.randperm(len(latents))[:32]])
    return model


def common(**changes: Any) -> dict[str, Any]:
    return {"steps": 6, "batch_size": 8, "warmup": 1, "bf16": False, "ema": 0.9, "seed": 9} | changes


def trainer_of(recipe: Recipe, seed: int = 0, config: AlitConfig = TINY) -> Trainer:
    model = fresh(seed, config)
    return Trainer(model, objective_for(model, recipe), recipe)


def batch() -> TrainingBatch:
    return TrainingBatch(images_u8(), [f"photo {i}" for i in range(8)])


def losses_of(trainer: Trainer, steps: int) -> list[float]:
    return [float(trainer.train_step(batch())["loss"]) for _ in range(steps)]


def same_state(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# ---------------------------------------------------------------- dead codes


def test_revival_moves_unused_codes_onto_vectors():
    """Codes that are never chosen move onto vectors of the batch."""
    codebook, vectors = torch.zeros(16, 3), torch.arange(1, 31.0).view(10, 3)
    revival, generator = CodeRevival(16, every=5), torch.Generator().manual_seed(0)
    for step in range(5):
        assert not codebook.any(), "not before its time"
        revival.observe(torch.zeros(10, dtype=torch.long), vectors)
        revival.revive(codebook, step, generator)
    assert not codebook[0].any(), "a code in use stays"
    assert all((vectors == row).all(1).any() for row in codebook[1:])
    assert (revival.usage[1:] == 1 / 16).all(), "and gets time to prove itself"


def test_training_codes_in_use_stay_where_they_are():
    """Codes in use stay where they are."""
    codebook = torch.rand(16, 3, generator=torch.Generator().manual_seed(1))
    before = codebook.clone()
    revival = CodeRevival(16, every=10)
    for step in range(30):
        revival.observe(torch.arange(16), torch.zeros(16, 3))
        revival.revive(codebook, step, torch.Generator().manual_seed(0))
    assert torch.equal(codebook, before)


def test_training_later_revivals_are_a_few_at_a_time():
    """Later revivals are a few at a time."""
    codebook = torch.zeros(32, 3)
    revival = CodeRevival(32, every=5)
    revival.observe(torch.zeros(4, dtype=torch.long), torch.ones(4, 3))
    revival.revive(codebook, 9, torch.Generator().manual_seed(0))
    assert codebook.any(1).sum() == 2


def test_training_dead_codes_of_a_trained_base_are_used_again():
    """Dead codes of a trained base are used again."""
    trainer = trainer_of(BaseRecipe(quantize_from=0, learning_rate=1e-3, **common(steps=200)))
    with torch.no_grad():
        trainer.model.base.codebook.weight[1:] = 100.0  # nothing is near them
    used = trainer.model.base.encode(images_u8() / 255).ids_BG.unique()
    assert len(used) == 1
    losses_of(trainer, 45)
    assert len(trainer.model.base.encode(images_u8() / 255).ids_BG.unique()) > 8


# ---------------------------------------------------------------- objectives

GOLDEN = {
    "base": [0.60969, 0.55232, 0.50495, 0.4685, 0.4524, 0.42026, 0.43863, 0.44074, 0.41651, 0.38958],
    "distill": [19.262, 16.221, 11.715, 10.978, 10.957, 10.94, 10.924, 19.068, 11.583, 16.972],
    "finetune": [0.63702, 0.54551, 0.49034, 0.44677, 0.38995, 0.37735, 0.34746, 0.32904, 0.30461, 0.29259],
}
"""Losses of the first ten steps, as this code gave them once (CPU, fp32, one thread)."""


def golden_recipe(stage: str) -> Recipe:
    changes = common(learning_rate=1e-3, steps=20)
    if stage == "base":
        return BaseRecipe(quantize_from=4, gan_from=6, **changes, **GAN)
    if stage == "distill":
        return DistillRecipe(
            grad_iterations=2, sample_depth=True, pixel_weight=0.5, quantize_from=3, quantize_over=4, **changes
        )
    return FinetuneRecipe(gan_from=5, **changes, **GAN)


@pytest.mark.parametrize("stage", list(GOLDEN))
def test_training_first_ten_losses_are_what_they_were(stage):
    """The first ten losses are what they were."""
    assert losses_of(trainer_of(golden_recipe(stage)), 10) == pytest.approx(GOLDEN[stage], rel=2e-3)


@pytest.mark.parametrize("quantize_from", [0, 300])
def test_training_base_learns_eight_images(quantize_from):
    """The base learns eight images."""
    losses = losses_of(trainer_of(BaseRecipe(quantize_from=quantize_from, learning_rate=3e-3, **common(steps=25))), 20)
    assert sum(losses[-3:]) / 3 < 0.7 * losses[0]


def test_training_kl_base_learns_eight_images():
    """A KL base learns eight images."""
    config = dataclasses.replace(
        WITHOUT_HALTING, base=KLConfig(channels=(32, 32), blocks=1, latent_dim=4), codebook_size=None
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Alit(config)
    recipe = BaseRecipe(learning_rate=3e-3, **common(steps=25))
    losses = losses_of(Trainer(model, objective_for(model, recipe), recipe), 20)
    assert sum(losses[-3:]) / 3 < 0.7 * losses[0]


def test_distillation_learns_eight_images():
    """The distillation learns eight images and leaves the base alone."""
    trainer = trainer_of(DistillRecipe(pixel_weight=0.5, quantize_from=0, learning_rate=3e-3, **common(steps=40)))
    before = copy.deepcopy(trainer.model)
    losses = losses_of(trainer, 35)
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]
    assert same_state(trainer.model.base, before.base)
    assert not same_state(trainer.model.encoder, before.encoder)


def test_finetuning_trains_each_length_in_turn():
    """Finetuning trains everything but the base codebook and takes each length in turn."""
    trainer = trainer_of(FinetuneRecipe(**common()), config=WITHOUT_HALTING)
    before = copy.deepcopy(trainer.model)
    names = [name for _ in range(5) for name in trainer.train_step(batch()) if name.startswith("l1_")]
    assert names == ["l1_0", "l1_1", "l1_2", "l1_3", "l1_0"]
    same = [
        n for (n, a), b in zip(trainer.model.named_parameters(), before.parameters(), strict=True) if torch.equal(a, b)
    ]
    assert same == ["base.codebook.weight", "encoder.mask_token"], "which nothing asks for without halting"


def test_training_base_objective_trains_the_base_only():
    """The base objective trains the base only."""
    trainer = trainer_of(BaseRecipe(**common()))
    before = copy.deepcopy(trainer.model)
    losses_of(trainer, 1)
    assert same_state(trainer.model.encoder, before.encoder)
    assert same_state(trainer.model.decoder, before.decoder)
    assert not same_state(trainer.model.base, before.base)


def test_sampled_depth_reaches_every_depth():
    """A sampled depth reaches every depth and supervises no more than asked."""
    model = fresh()
    objective = DistillObjective(model, DistillRecipe(sample_depth=True, grad_iterations=2, **common()))
    generator = torch.Generator().manual_seed(0)
    chosen = [objective._supervised(4, generator) for _ in range(60)]
    assert {max(some) for some in chosen} == {0, 1, 2, 3}
    assert {len(some) for some in chosen} == {1, 2}


def test_perceptual_loss_is_neither_trained_nor_stored():
    """The perceptual loss is no part of what is trained or kept."""
    config = dataclasses.replace(WITHOUT_HALTING, image_size=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        perceptual = Perceptual()
    model, recipe = fresh(config=config), FinetuneRecipe(**common())
    trainer = Trainer(model, objective_for(model, recipe, perceptual), recipe)
    numbers = trainer.train_step(batch())
    assert numbers["perceptual"] > 0
    assert not any("vgg" in name or "percept" in name for name in trainer.state_dict()["model"])
    assert all(p.grad is None for p in perceptual.parameters())


# ---------------------------------------------------------------- the adversary


def test_adversarial_optimizers_step_on_schedule():
    """Both sides step on schedule each with its own optimizer."""
    recipe = FinetuneRecipe(gan_from=3, **common(), **GAN)
    trainer = trainer_of(recipe, config=WITHOUT_HALTING)
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


def test_generator_step_leaves_the_discriminator_alone():
    """The generator's turn leaves no gradient in the discriminator."""
    recipe = FinetuneRecipe(gan_from=0, **common(), **GAN)
    trainer = trainer_of(recipe, config=WITHOUT_HALTING)
    adversary = trainer.objective.adversary
    assert adversary is not None
    losses = trainer.objective.losses(trainer.model, images_u8() / 255, 2, trainer.generator)
    losses.total.backward()
    assert all(p.grad is None for p in adversary.discriminator.parameters())
    adversary.discriminator_loss().backward()
    grads = [p.grad for p in adversary.discriminator.parameters()]
    assert all(grad is not None for grad in grads)


def test_discriminator_learns_to_tell_images_from_noise():
    """The discriminator learns to tell images from noise."""
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


def test_discriminator_knows_the_length():
    """A discriminator knows the length and has no batch statistics."""
    torch.manual_seed(0)
    images = images_u8() / 255
    for discriminator in (PatchDiscriminator(4, width=8, layers=2), DiscriminatorPerLength(4, width=8, layers=2)):
        assert not torch.equal(discriminator(images, 0), discriminator(images, 3))
        torch.testing.assert_close(discriminator(images[:1], 2), discriminator(images, 2)[:1])
        assert not list(discriminator.buffers())


def test_adaptive_weight_balances_both_gradients():
    """The adaptive weight balances the two pulls on the last layer."""
    layer = torch.ones(3, requires_grad=True)
    weight = adaptive_weight((layer * 6).sum(), (layer * 2).sum(), layer)
    assert float(weight) == pytest.approx(3, rel=1e-3)


# ---------------------------------------------------------------- one step


def test_training_share_in_parts_is_the_same_step():
    """A share in parts is the same step."""
    whole = trainer_of(DistillRecipe(quantize_from=0, **common()), config=WITHOUT_HALTING)
    parts = trainer_of(DistillRecipe(quantize_from=0, **common(accumulate=4)), config=WITHOUT_HALTING)
    for trainer in (whole, parts):
        assert trainer.objective.revival is not None
        trainer.objective.revival.every = 1000  # it sees another last part
    assert losses_of(parts, 3) == pytest.approx(losses_of(whole, 3), rel=2e-2)


def test_training_recomputed_activations_give_the_same_step():
    """Recomputed activations give the same step."""
    kept = trainer_of(DistillRecipe(quantize_from=0, **common()))
    recomputed = trainer_of(DistillRecipe(quantize_from=0, **common(recompute=True)))
    assert losses_of(kept, 3) == pytest.approx(losses_of(recomputed, 3), rel=1e-5)


class Poisoned(DistillObjective):
    """An objective that fails at its second step."""

    def losses(self, model: Alit, images: Tensor, step: int, generator: torch.Generator) -> Losses:
        found = super().losses(model, images, step, generator)
        return found if step == 0 else found._replace(total=found.total * float("nan"))


def test_training_stops_at_a_loss_that_is_not_finite():
    """A loss that is not finite stops before anything is updated and names the images."""
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


def test_training_average_is_of_the_trained_weights_and_decodes():
    """The average is of the trained weights and decodes."""
    trainer = trainer_of(FinetuneRecipe(learning_rate=1e-2, **common()), config=WITHOUT_HALTING)
    start = copy.deepcopy(trainer.model)
    losses_of(trainer, 3)
    averaged = trainer.averaged_model()
    assert not same_state(averaged, trainer.model)
    assert not same_state(averaged, start)
    assert torch.equal(averaged.base.codebook.weight, trainer.model.base.codebook.weight)
    assert averaged.decode(averaged.encode(images_u8(), "fixed:4").split()).shape == (8, 3, 16, 16)


# ---------------------------------------------------------------- interruptions


def settings(recipe: Recipe, **changes: Any) -> RunSettings:
    stage = next(name for name, kind in RECIPES.items() if isinstance(recipe, kind))
    given = {
        "stage": stage, "recipe": recipe, "preset": "nano", "data": "photos/", "validation": None, "init": None,
        "init_fingerprint": None, "criterion": None, "half": False, "photographs": 100,
    }  # fmt: skip
    return RunSettings(**given | changes)


def run_of(folder: Path, recipe: Recipe, said: list[Any] | None = None, **changes: Any) -> RunFolder:
    on_event = (lambda event: None) if said is None else said.append
    validation_images = changes.pop("validation_images", None)
    return RunFolder(
        parse_uri(str(folder)), settings(recipe, **changes), validation_images=validation_images, on_event=on_event
    )


def batches(first: int) -> Iterator[TrainingBatch]:
    for step in range(first, 1000):
        yield TrainingBatch(
            torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
        )


EVERYTHING: list[Recipe] = [
    BaseRecipe(quantize_from=2, **common(checkpoint_every=1), **GAN),
    DistillRecipe(grad_iterations=2, pixel_weight=0.5, quantize_over=4, **common(checkpoint_every=1)),
    FinetuneRecipe(**common(checkpoint_every=1), **GAN),
]
"""All that draws random numbers: iterations, pixels, halting, revivals; and both optimizers."""


def with_revivals(trainer: Trainer) -> Trainer:
    assert trainer.objective.revival is not None
    trainer.objective.revival.every, trainer.objective.revival.floor = 2, 0.5
    return trainer


@pytest.mark.parametrize("recipe", EVERYTHING, ids=list(RECIPES))
def test_training_resumes_bitwise_from_a_checkpoint(tmp_path, recipe):
    """A run that was killed ends bitwise as an undisturbed one."""
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
    said: list[Any] = []
    resumed = with_revivals(trainer_of(recipe, seed=1))  # other initial weights: all must come from the checkpoint
    run = run_of(tmp_path / "parts", recipe, said)
    run.resume(resumed)
    assert Message(text="resuming at step 3") in said
    train(resumed, batches(resumed.step), run)
    assert resumed.step == undisturbed.step == 6
    one, two = resumed.state_dict(), undisturbed.state_dict()
    for part in ("model", "average", "discriminator", "revival"):
        assert all(torch.equal(one[part][name], tensor) for name, tensor in two[part].items()), part
    assert torch.equal(one["generator"], two["generator"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / LOG).read_text().splitlines()]
    assert steps == sorted(set(steps)), "no line twice"


def test_training_writes_settings_log_images_and_weights(tmp_path):
    """A run writes its settings log images board and weights."""
    recipe = FinetuneRecipe(**common(log_every=2, validate_every=3, checkpoint_every=6))
    trainer, said = trainer_of(recipe, config=WITHOUT_HALTING), []
    run = run_of(tmp_path, recipe, said, validation_images=images_u8(), criterion="l1:0.2", half=True)
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


def test_training_reports_undecodable_images_once(tmp_path):
    """Images that cannot be decoded are reported once and kept in a file."""
    recipe = BaseRecipe(**common(steps=3))
    trainer, said = trainer_of(recipe), []
    run = run_of(tmp_path, recipe, said)
    run.resume(trainer)
    bad = TrainingBatch(images_u8(), ["a"] * 8, [("b.jpg", "truncated", "the file ends too early")])
    train(trainer, run.without_rejects(iter([bad] * 3)), run)
    assert json.loads((tmp_path / "rejects.jsonl").read_text()) == {
        "id": "b.jpg", "reason": "truncated", "message": "the file ends too early",
    }  # fmt: skip
    assert sum(isinstance(event, Message) and "b.jpg" in event.text for event in said) == 1


def checkpoint_of(folder: Path, recipe: Recipe) -> None:
    trainer, run = trainer_of(recipe), run_of(folder, recipe)
    run.resume(trainer)
    run.checkpoint(trainer, None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"code_dim": 8}, "the checkpoint's model has code_dim=6, this run asks for 8"),
        ({"iterations": 3}, "the checkpoint's model has iterations=4, this run asks for 3"),
        ({"halting": "off"}, "the checkpoint's model has halting='sampled', this run asks for 'off'"),
    ],
)
def test_training_refuses_a_checkpoint_of_another_model(tmp_path, changes, expected):
    """A checkpoint of another model is refused naming the field."""
    recipe = DistillRecipe(**common())
    checkpoint_of(tmp_path, recipe)
    with pytest.raises(TrainingError, match=expected):
        run_of(tmp_path, recipe).resume(trainer_of(recipe, config=dataclasses.replace(TINY, **changes)))


def test_training_refuses_a_checkpoint_of_another_recipe(tmp_path):
    """A checkpoint of another recipe stage or data is refused naming the field."""
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


def test_training_resumes_with_more_steps(tmp_path):
    """More steps and other intervals resume from the same checkpoint."""
    checkpoint_of(tmp_path, DistillRecipe(**common()))
    longer = DistillRecipe(**common(steps=9, log_every=3, keep=5, accumulate=2))
    trainer, said = trainer_of(longer), []
    run_of(tmp_path, longer, said).resume(trainer)
    assert Message(text="resuming at step 0") in said


def test_training_data_that_ends_too_early_is_a_sentence(tmp_path):
    """Data that ends too early is a sentence."""
    recipe = BaseRecipe(**common())
    trainer, run = trainer_of(recipe), run_of(tmp_path, recipe)
    run.resume(trainer)
    with pytest.raises(TrainingError, match="the data ended at step 2 of 6"):
        train(trainer, islice(batches(0), 2), run)


# ---------------------------------------------------------------- recipes


def test_training_learning_rate_warms_up_and_falls_to_zero():
    """The learning rate warms up and falls to zero."""
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
    """A recipe that cannot be is refused with the value."""
    with pytest.raises(ConfigError, match=sentence):
        recipe_from("distill", "nano", changes)


@pytest.mark.parametrize("stage", list(RECIPES))
def test_training_model_preset_has_a_recipe_for_every_stage(stage):
    """Every model preset has a recipe for every stage."""
    assert all(isinstance(recipe_from(stage, preset), RECIPES[stage]) for preset in PRESETS)
    assert recipe_from(stage, "nano", {"steps": 7, "learning_rate": 1}).learning_rate == 1.0


# ---------------------------------------------------------------- cost


def test_cost_counts_parameters_exactly():
    """The cost counts parameters exactly and computes nothing."""
    recipe = FinetuneRecipe(**common(), **GAN)
    model = fresh(config=WITHOUT_HALTING)
    objective = objective_for(model, recipe)
    found = cost(WITHOUT_HALTING, recipe)
    trained = sum(p.numel() for _, p in objective.trainable(model))
    assert found.trained == trained
    assert found.trained + found.frozen == sum(p.numel() for p in model.parameters())
    assert objective.adversary is not None
    assert found.discriminator == sum(p.numel() for p in objective.adversary.discriminator.parameters())
    assert found.activation_bytes > 16 * 16 * 3 * 4
    deeper = cost(dataclasses.replace(WITHOUT_HALTING, depth=4), recipe)
    assert deeper.flops > 1.2 * found.flops


def test_flops_are_those_of_a_known_network():
    """Forward and backward of a linear layer are 6 operations per weight and row; a transformer is mostly such."""
    recipe = DistillRecipe(quantize_from=0, **common())
    config = dataclasses.replace(WITHOUT_HALTING, width=64, depth=6)
    found = cost(config, recipe).flops
    rows = sum(1 + 64 + 4 * (k + 1) for k in range(4))  # of encoder and decoder alike
    blocks = 2 * 6 * rows * 12 * 64 * 64 * 6
    assert blocks < found < 2 * blocks


# ---------------------------------------------------------------- initial values


def own_share(model: Alit) -> float:
    """Over all latents of the first iteration, how often the attention's centroid lies nearest to the latent's own
    quarter of the image: 4 latents over a grid of 8 x 8 start at the quarters' middles."""
    maps_BNgg = model.attention_maps(images_u8())[0]
    line = torch.arange(8) + 0.5
    centroids_BN2 = torch.stack([(maps_BNgg.sum(3) * line).sum(2), (maps_BNgg.sum(2) * line).sum(2)], dim=-1)
    middles = torch.tensor([[2.0, 2.0], [2.0, 6.0], [6.0, 2.0], [6.0, 6.0]])
    return (torch.cdist(centroids_BN2, middles).argmin(-1) == torch.arange(4)).float().mean().item()


def concentration(model: Alit) -> float:
    """Mean share of attention that the latents of the first iteration pay to their own quarter of the image."""
    maps_BNgg = model.attention_maps(images_u8())[0]
    quarters = maps_BNgg.unflatten(3, (2, 4)).unflatten(2, (2, 4)).sum((3, 5)).flatten(2)  # [B, N, 4]
    return quarters.diagonal(dim1=1, dim2=2).mean().item()


def test_initialization_makes_latents_attend_locally():
    """Local initial values make each latent look near its place."""
    config = dataclasses.replace(TINY, width=128, heads=4, halting="off")
    local, published = fresh(config=config), fresh(config=config)
    initialize_locally(local, torch.Generator().manual_seed(0))
    assert own_share(local) > 0.9
    assert own_share(published) < 0.7
    assert concentration(local) > 0.4
    assert concentration(published) == pytest.approx(0.25, abs=0.05)


def test_initialization_follows_the_generator():
    """Local initial values follow the generator and stay trainable."""
    one, two = fresh(), fresh()
    for model in (one, two):
        initialize_locally(model, torch.Generator().manual_seed(0))
    assert same_state(one, two)
    assert all(p.requires_grad and torch.isfinite(p).all() for p in one.parameters())
