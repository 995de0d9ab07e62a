"""Training goes on exactly where it stopped, stops before it does harm, and its objectives fall."""

import copy
import dataclasses
import io
import json
from collections.abc import Iterator
from functools import cache
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import TINY as WITHOUT_HALTING
from torch import Tensor, nn

from alit.config import AlitConfig
from alit.data import random_crop, training_batches
from alit.errors import ConfigError, TrainingError
from alit.initialization import initialize_locally
from alit.objectives import BaseObjective, CodeRevival, DistillObjective, Losses
from alit.tokenizer import Alit
from alit.training import CHECKPOINT, LOG, TrainConfig, Trainer, train

TINY = dataclasses.replace(WITHOUT_HALTING, halting="sampled", halting_threshold=0.03)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, so that results are the same bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def images_u8() -> Tensor:
    """Eight smooth images."""
    coarse = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
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


def settings(steps: int, **changes: object) -> TrainConfig:
    return TrainConfig(**({"steps": steps, "batch_size": 8, "warmup": 1, "bf16": False, "ema": 0.9} | changes))


def same_state(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# ---------------------------------------------------------------- dead codes


def test_codes_that_are_never_chosen_move_onto_vectors_of_the_batch():
    codebook, vectors = torch.zeros(16, 3), torch.arange(1, 31.0).view(10, 3)
    revival, generator = CodeRevival(codebook, every=5), torch.Generator().manual_seed(0)
    for step in range(5):
        assert not codebook.any(), "not before its time"
        revival.observe(torch.zeros(10, dtype=torch.long), vectors)
        revival.revive(step, generator)
    assert not codebook[0].any(), "a code in use stays"
    assert all((vectors == row).all(1).any() for row in codebook[1:])
    assert (revival.usage[1:] == 1 / 16).all(), "and gets time to prove itself"


def test_codes_in_use_stay_where_they_are():
    codebook = torch.rand(16, 3, generator=torch.Generator().manual_seed(1))
    before = codebook.clone()
    revival = CodeRevival(codebook, every=10)
    for step in range(30):
        revival.observe(torch.arange(16), torch.zeros(16, 3))
        revival.revive(step, torch.Generator().manual_seed(0))
    assert torch.equal(codebook, before)


def test_later_revivals_are_a_few_at_a_time():
    codebook = torch.zeros(32, 3)
    revival = CodeRevival(codebook, every=5)
    revival.observe(torch.zeros(4, dtype=torch.long), torch.ones(4, 3))
    revival.revive(9, torch.Generator().manual_seed(0))
    assert codebook.any(1).sum() == 2


# ---------------------------------------------------------------- data


def file_of(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@cache
def plain_photographs(count: int) -> tuple[bytes, ...]:
    """Photographs of one colour each, by which a crop tells which one it is from."""
    return tuple(file_of(np.full((20, 24, 3), i, np.uint8)) for i in range(count))


@cache
def photographs() -> tuple[bytes, ...]:
    random = np.random.default_rng(0)
    return tuple(file_of(random.integers(0, 256, (24, 20, 3), np.uint8)) for _ in range(10))


def test_a_batch_depends_on_seed_and_step_alone():
    given = {"size": 16, "batch_size": 4, "seed": 3}
    undisturbed = list(islice(training_batches(photographs(), **given), 7))
    assert all(batch.shape == (4, 3, 16, 16) and batch.dtype == torch.uint8 for batch in undisturbed)
    for first in (1, 2, 5):
        resumed = islice(training_batches(photographs(), **given, first_step=first, ahead=1), 7 - first)
        assert all(torch.equal(a, b) for a, b in zip(resumed, undisturbed[first:], strict=True))
    other = next(training_batches(photographs(), **given | {"seed": 4}))
    assert not torch.equal(other, undisturbed[0])


def test_an_epoch_sees_no_photograph_twice_and_epochs_differ():
    batches = islice(training_batches(plain_photographs(11), size=8, batch_size=3, seed=0), 9)
    seen = [batch[:, 0, 0, 0].tolist() for batch in batches]
    epochs = [[*seen[i], *seen[i + 1], *seen[i + 2]] for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert {photograph for epoch in epochs for photograph in epoch} == {*range(11)}, "each is left out at times only"


def test_a_batch_may_be_all_of_the_data_but_not_more():
    next(training_batches(plain_photographs(11), size=8, batch_size=11, seed=0))
    with pytest.raises(TrainingError, match="batch_size 12 is larger than the data: 11 photographs"):
        next(training_batches(plain_photographs(11), size=8, batch_size=12, seed=0))


@pytest.mark.parametrize("shape", [(30, 20, 3), (20, 30), (5, 5, 3), (20, 20, 4), (8, 90, 3)])
def test_a_random_crop_has_the_asked_size_and_colours(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    crop = random_crop(file_of(pixels), 16, np.random.default_rng(1))
    assert (crop.shape, crop.dtype) == ((16, 16, 3), np.uint8)


def test_random_crops_are_mirrored_half_of_the_time_and_follow_the_generator():
    ramp = file_of(np.broadcast_to(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], (30, 30, 3)).copy())
    crops = [random_crop(ramp, 8, np.random.default_rng(i)) for i in range(40)]
    mirrored = sum(bool(crop[0, 0, 0] > crop[0, -1, 0]) for crop in crops)
    assert 10 <= mirrored <= 30
    np.testing.assert_array_equal(crops[7], random_crop(ramp, 8, np.random.default_rng(7)))
    assert len({crop.tobytes() for crop in crops}) > 20


# ---------------------------------------------------------------- objectives


def losses_of(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.train_step(images_u8())["loss"] for _ in range(steps)]


@pytest.mark.parametrize("quantize_from", [0, 300])
def test_the_base_learns_eight_images(quantize_from):
    model = fresh()
    objective = BaseObjective(model, quantize_from=quantize_from)
    losses = losses_of(Trainer(model, objective, settings(25, learning_rate=3e-3)), 20)
    assert np.mean(losses[-3:]) < 0.7 * losses[0]


def test_the_distillation_learns_eight_images_and_leaves_the_base_alone():
    model = fresh()
    before = copy.deepcopy(model)
    objective = DistillObjective(model, pixel_weight=0.5)
    losses = losses_of(Trainer(model, objective, settings(40, learning_rate=3e-3)), 25)
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    assert same_state(model.base, before.base)
    assert not same_state(model.encoder, before.encoder)


def test_the_base_objective_trains_the_base_only():
    model = fresh()
    before = copy.deepcopy(model)
    losses_of(Trainer(model, BaseObjective(model), settings(2)), 1)
    assert same_state(model.encoder, before.encoder)
    assert same_state(model.decoder, before.decoder)
    assert not same_state(model.base, before.base)


# ---------------------------------------------------------------- interruptions


def trainer_of(seed: int) -> Trainer:
    """Distillation with everything that draws random numbers: iterations, pixels, halting, revivals."""
    model = fresh(seed)
    objective = DistillObjective(model, iterations=2, pixel_weight=0.5, quantize_over=4)
    assert objective.revival is not None
    objective.revival.every, objective.revival.floor = 2, 0.5
    return Trainer(model, objective, settings(6, batch_size=4, seed=9, checkpoint_seconds=0.0))


def batches(step: int) -> Iterator[Tensor]:
    return training_batches(photographs(), size=16, batch_size=4, seed=9, first_step=step, ahead=1)


def no_validation(model: Alit) -> dict[str, float]:
    return {}


def quiet(line: str) -> None:
    return None


def test_a_run_that_was_killed_ends_bitwise_as_an_undisturbed_one(tmp_path):
    undisturbed = trainer_of(0)
    train(undisturbed, batches, tmp_path / "whole", validate=no_validation, report=quiet)

    def killed(step: int) -> Iterator[Tensor]:
        yield from islice(batches(step), 3)
        raise KeyboardInterrupt

    first = trainer_of(0)
    with pytest.raises(KeyboardInterrupt):
        train(first, killed, tmp_path / "parts", validate=no_validation, report=quiet)
    assert first.step == 3
    resumed, said = trainer_of(1), []  # other initial weights: all must come from the checkpoint
    train(resumed, batches, tmp_path / "parts", validate=no_validation, report=said.append)
    assert said[0] == "resuming at step 3"
    assert resumed.step == undisturbed.step == 6
    assert same_state(resumed.model, undisturbed.model)
    assert same_state(resumed.ema, undisturbed.ema)
    assert torch.equal(resumed.generator.get_state(), undisturbed.generator.get_state())
    assert not same_state(resumed.model, resumed.ema)


def test_a_run_that_has_ended_ends_at_once_when_started_again(tmp_path):
    model, other = fresh(0), fresh(3)
    trainer = Trainer(model, BaseObjective(model), settings(1))
    trainer.train_step(images_u8())
    trainer.save(tmp_path)
    again = Trainer(other, BaseObjective(other), settings(1))
    train(again, lambda step: iter([images_u8()]), tmp_path, validate=no_validation, report=quiet)
    assert again.step == 1
    assert same_state(again.model, trainer.model)


def test_what_was_validated_is_logged_also_between_the_steps_that_are(tmp_path):
    model = fresh()
    config = dataclasses.replace(settings(4), log_every=100, validate_every=3)
    trainer = Trainer(model, BaseObjective(model), config)
    train(trainer, lambda step: repeat(images_u8()), tmp_path, validate=lambda model: {"val": 1.0}, report=quiet)
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [(row["step"], row["val"]) for row in rows] == [(3, 1.0), (4, 1.0)]


def test_a_folder_without_a_checkpoint_starts_anew(tmp_path):
    assert not trainer_of(0).resume(tmp_path)


def test_a_save_that_is_interrupted_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = trainer_of(0)
    trainer.save(tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def interrupted(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(OSError, match="No space left"):
        trainer.save(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"code_dim": 8}, "the checkpoint has code_dim=6, this run asks for 8"),
        ({"iterations": 3}, "the checkpoint has iterations=4, this run asks for 3"),
        ({"halting": "off"}, "the checkpoint has halting='sampled', this run asks for 'off'"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_naming_the_field(tmp_path, changes, expected):
    trainer_of(0).save(tmp_path)
    other = fresh(config=dataclasses.replace(TINY, **changes))
    with pytest.raises(TrainingError) as error:
        Trainer(other, DistillObjective(other), settings(6)).resume(tmp_path)
    assert str(error.value) == expected


class Poisoned(DistillObjective):
    """An objective that fails at its second step."""

    def losses(self, model: Alit, images: Tensor, step: int, generator: torch.Generator) -> Losses:
        found = super().losses(model, images, step, generator)
        return found if step == 0 else found._replace(total=found.total * float("nan"))


def test_a_loss_that_is_not_finite_stops_before_anything_is_updated():
    model = fresh()
    trainer = Trainer(model, Poisoned(model), settings(6))
    trainer.train_step(images_u8())
    model_before, ema_before = copy.deepcopy(trainer.model), copy.deepcopy(trainer.ema)
    optimizer_before = copy.deepcopy(trainer.optimizer.state_dict()["state"])
    with pytest.raises(TrainingError, match="the loss at step 1 is nan; nothing was updated"):
        trainer.train_step(images_u8())
    assert trainer.step == 1
    assert same_state(trainer.model, model_before)
    assert same_state(trainer.ema, ema_before)
    for key, state in trainer.optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, optimizer_before[key][name]) for name, tensor in state.items())


# ---------------------------------------------------------------- the schedule


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(steps=100, warmup=10, learning_rate=1.0)
    rates = [config.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[:9] == sorted(rates[:9])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["steps", "batch_size", "warmup", "log_every", "validate_every"])
def test_a_training_config_of_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        TrainConfig(**({"steps": 5} | {name: 0}))


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


def test_local_initial_values_make_each_latent_look_near_its_place():
    config = dataclasses.replace(TINY, width=128, heads=4, halting="off")
    local, published = fresh(config=config), fresh(config=config)
    initialize_locally(local, torch.Generator().manual_seed(0))
    assert own_share(local) > 0.9
    assert own_share(published) < 0.7
    assert concentration(local) > 0.4
    assert concentration(published) == pytest.approx(0.25, abs=0.05)


def test_local_initial_values_follow_the_generator_and_stay_trainable():
    one, two = fresh(), fresh()
    for model in (one, two):
        initialize_locally(model, torch.Generator().manual_seed(0))
    assert same_state(one, two)
    assert all(p.requires_grad and torch.isfinite(p).all() for p in one.parameters())
