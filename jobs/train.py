"""Training on one machine: `alit train`, from photographs to a weights folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from alit import __version__, metrics
from alit.config import PRESETS
from alit.data import center_crops, read_photographs, training_batches
from alit.errors import ConfigError
from alit.initialization import initialize_locally
from alit.objectives import BaseObjective, DistillObjective, Objective
from alit.selection import parse
from alit.tokenizer import Alit
from alit.training import TrainConfig, Trainer, train
from alit.weights import load_weights, save_weights
from jobs.evaluate import perplexity

VALIDATION_BATCH = 64


def _model(preset: str, init: Path | None, seed: int) -> Alit:
    if init is not None:
        return load_weights(init).model.train()
    if preset not in PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    torch.manual_seed(seed)
    return Alit(PRESETS[preset]())


def train_stage(
    stage: str,
    data: str,
    run: Path,
    *,
    steps: int,
    validation: str | None = None,
    init: Path | None = None,
    preset: str = "nano",
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    warmup: int = 100,
    iterations: int | None = None,
    quantize_from: int = 250,
    pixel_weight: float = 0.0,
    pixel_from: int = 0,
    seed: int = 0,
    threads: int | None = None,
    criterion: str | None = None,
    half: bool = False,
    report: Callable[[str], None] = print,
) -> Path:
    """Trains one stage and returns the folder of its averaged weights; the arguments are those of `alit train`."""
    if criterion is not None:
        parse(criterion)  # before hours of training, not after
    if threads is not None:
        torch.set_num_threads(threads)
    if stage == "distill" and init is None:
        raise ConfigError("distill stands on a trained base: name its weights folder with --init")
    model = _model(preset, init, seed)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (convolutions are faster so)
    config = TrainConfig(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, warmup=warmup, seed=seed, validate_every=250
    )
    objective: Objective
    if stage == "base":
        objective = BaseObjective(model, quantize_from=quantize_from)
    else:
        if not (run / "checkpoint.pt").exists():
            initialize_locally(model, torch.Generator().manual_seed(seed))
        objective = DistillObjective(
            model,
            iterations=iterations,
            quantize_from=quantize_from,
            quantize_over=max(1, steps // 20),
            pixel_weight=pixel_weight,
            pixel_from=pixel_from,
        )
    photographs = read_photographs(data)
    held_out = center_crops(read_photographs(validation), model.config.image_size) if validation else None
    trainer = Trainer(model, objective, config)

    def validate(averaged: Alit) -> dict[str, float]:
        if held_out is None:
            return {}
        return base_numbers(averaged, held_out) if stage == "base" else distill_numbers(averaged, held_out)

    def batches(first_step: int):
        size = model.config.image_size
        return training_batches(photographs, size=size, batch_size=batch_size, seed=seed, first_step=first_step)

    report(f"{len(photographs)} photographs, {sum(p.numel() for p in trainer.parameters) / 1e6:.2f} M parameters")
    train(trainer, batches, run, validate=validate, report=report)
    averaged = trainer.ema
    if criterion is not None:
        averaged.config = replace(averaged.config, criterion=criterion)
    provenance = {"stage": stage, "training": asdict(config), "photographs": len(photographs), "software": __version__}
    dtype = torch.float16 if half else torch.float32
    save_weights(run / "weights", averaged, provenance=provenance, dtype=dtype)
    return run / "weights"


def _floats(images: Tensor) -> list[Tensor]:
    return [part.float() / 255 for part in images.split(VALIDATION_BATCH)]


@torch.no_grad()
def base_numbers(model: Alit, images: Tensor) -> dict[str, float]:
    """L1 of the base tokenizer's own reconstruction of uint8 images, and its codebook's use."""
    errors, ids = [], []
    for part in _floats(images):
        base = model.base.encode(part)
        errors.append(metrics.l1(part, model.base.decode(base.target_BDhw)))
        ids.append(base.ids_BG)
    numbers = {"val_l1": float(torch.cat(errors).mean())}
    if ids[0] is not None:
        numbers["perplexity"] = perplexity(torch.cat(ids), model.base.prediction_dim)
    return numbers


@torch.no_grad()
def distill_numbers(model: Alit, images: Tensor) -> dict[str, float]:
    """L1 at every length, of uint8 images, and the latent codebook's use at the longest."""
    lengths, errors, ids = model.config.lengths, [], []
    for part in _floats(images):
        steps = list(model.rollout(part))
        errors.append(torch.stack([metrics.l1(part, model.reconstruct(step.codes_BNC)) for step in steps]))
        ids.append(steps[-1].ids_BN)
    means = torch.cat(errors, 1).mean(1).tolist()
    numbers = {f"val_l1_{length}": value for length, value in zip(lengths, means, strict=True)}
    if model.codebook is not None:
        numbers["perplexity"] = perplexity(torch.cat(ids), len(model.codebook.weight))
    return numbers
