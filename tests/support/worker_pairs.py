"""One training by a single worker, or by two gloo workers with half of each batch; see `test_distributed.py`."""

from __future__ import annotations

import dataclasses
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_models import TINY
from torch import Tensor, nn

from alit.model.config import AlitConfig, KLConfig
from alit.tokenizer import Alit
from alit.training.objectives import objective_for
from alit.training.recipes import BaseRecipe, DistillRecipe, FinetuneRecipe, Recipe
from alit.training.trainer import Trainer, TrainingBatch

BATCH = 8
STEPS = 8
GAN = {"gan_weight": 0.5, "gan_from": 3, "gan_ramp": 3, "discriminator_width": 8, "discriminator_layers": 2}
COMMON: dict[str, Any] = {
    "steps": 40,
    "batch_size": BATCH,
    "warmup": 2,
    "bf16": False,
    "ema": 0.9,
    "learning_rate": 1e-3,
}
SHALLOW = dataclasses.replace(TINY, depth=1, iterations=3)
HALTING = dataclasses.replace(SHALLOW, halting="sampled", halting_threshold=0.03)
KL = dataclasses.replace(SHALLOW, base=KLConfig(channels=(32, 32), blocks=1, latent_dim=4), codebook_size=None)
CASES: dict[str, tuple[AlitConfig, Recipe]] = {
    "base": (SHALLOW, BaseRecipe(quantize_from=3, **COMMON, **GAN)),
    "base-kl": (KL, BaseRecipe(**COMMON, **GAN)),
    "distill": (
        HALTING,
        DistillRecipe(grad_iterations=2, pixel_weight=0.5, quantize_from=2, quantize_over=4, **COMMON),
    ),
    "finetune": (SHALLOW, FinetuneRecipe(**COMMON, **GAN)),
    "finetune-per-length": (SHALLOW, FinetuneRecipe(discriminator="per-length", **COMMON, **GAN)),
}


def global_batch(step: int) -> Tensor:
    """Returns smooth images, uint8 [8, 3, 16, 16], different ones each step."""
    coarse = torch.rand(BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(step))
    return (255 * nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(0, 1)).to(torch.uint8)


def trainer_of(case: str, **changes: Any) -> Trainer:
    """Returns a case's trainer with its initial values, the same on every worker; it revives codes within the steps."""
    config, recipe = CASES[case]
    recipe = dataclasses.replace(recipe, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Alit(config).double()
        if case != "base-kl":
            with torch.no_grad():
                images = global_batch(0).double() / 255
                latents = model.base.encode(images).latents_BDhw.permute(0, 2, 3, 1).flatten(0, 2)
                model.base.codebook.weight.copy_(latents[torch.randperm(len(latents))[:32]])
    objective = objective_for(model, recipe)
    if objective.adversary is not None:
        objective.adversary.discriminator.double()
    if (revival := objective.revival) is not None:
        # four codes are revived: rows are drawn with replacement, and rounding would choose between equal ones
        revival.every = 3
        revival.usage.fill_(1 / len(revival.usage))[:4] = 0
    return Trainer(model, objective, recipe)


def train(case: str, rank: int, workers: int, **changes: Any) -> dict[str, Any]:
    """Returns the losses of all steps, averaged over workers, and the state at the end."""
    from alit.training import distributed

    torch.set_num_threads(1)
    trainer = trainer_of(case, **changes)
    share = BATCH // workers
    losses = []
    for step in range(STEPS):
        images = global_batch(step)[rank * share : (rank + 1) * share]
        numbers = trainer.train_step(TrainingBatch(images))
        losses.append(float(distributed.averaged(numbers["loss"])))
    return {"losses": losses, "state": trainer.state_dict()}


if __name__ == "__main__":  # python worker_pairs.py RANK WORKERS STORE OUTPUT CASE-SHARDING...
    rank, workers, store, output, *runs = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(workers), timeout=timedelta(seconds=120)
    )
    for run in runs:
        case, _, sharding = run.rpartition("-")
        result = train(case, int(rank), int(workers), sharding=sharding)
        if rank == "0":
            torch.save(result, Path(output) / f"{run}.pt")
    dist.barrier()
    os._exit(0)  # gloo has threads that may outlive the interpreter's teardown, which then aborts
