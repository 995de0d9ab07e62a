"""Trainers of a small model, and their batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from small_models import TINY
from torch import Tensor, nn

from alit.model.config import AlitConfig
from alit.tokenizer import Alit
from alit.training.objectives import objective_for
from alit.training.recipes import Recipe
from alit.training.trainer import Trainer, TrainingBatch

HALTING = dataclasses.replace(TINY, halting="sampled", halting_threshold=0.03)
GAN = {"gan_weight": 0.3, "gan_ramp": 2, "discriminator_width": 8, "discriminator_layers": 2}


@cache
def images_u8(count: int = 8) -> Tensor:
    """Returns smooth images, uint8 [count, 3, 16, 16]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (255 * nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(0, 1)).to(torch.uint8)


@torch.no_grad()
def fresh(seed: int = 0, config: AlitConfig = HALTING, dtype: torch.dtype = torch.float32) -> Alit:
    """Returns an untrained model, its base codebook among the latents of real images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Alit(config).to(dtype)
        latents = model.base.encode(images_u8().to(dtype) / 255).latents_BDhw.permute(0, 2, 3, 1).flatten(0, 2)
        model.base.codebook.weight.copy_(latents[torch.randperm(len(latents))[:32]])
    return model


def common(**changes: Any) -> dict[str, Any]:
    """Returns the fields that the recipes of all stages share."""
    return {"steps": 6, "batch_size": 8, "warmup": 1, "bf16": False, "ema": 0.9, "seed": 9} | changes


def trainer_of(
    recipe: Recipe, seed: int = 0, config: AlitConfig = HALTING, dtype: torch.dtype = torch.float32
) -> Trainer:
    """Returns the trainer of an untrained model."""
    model = fresh(seed, config, dtype)
    return Trainer(model, objective_for(model, recipe), recipe)


def batch() -> TrainingBatch:
    """Returns a batch of eight images, always the same."""
    return TrainingBatch(images_u8(), [f"photo {i}" for i in range(8)])


def batches(first: int) -> Iterator[TrainingBatch]:
    """Yields the batches of a run from step `first`, different ones each step."""
    for step in range(first, 1000):
        yield TrainingBatch(
            torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
        )


def losses_of(trainer: Trainer, steps: int) -> list[float]:
    """Trains on the same batch, and returns the loss of each step."""
    return [float(trainer.train_step(batch())["loss"]) for _ in range(steps)]


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Returns whether two modules have bitwise equal states."""
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
