"""Training learns real photographs, which takes minutes, so `make slow` runs it."""

from __future__ import annotations

import pytest
import torch

from alit.model.config import AlitConfig, VQGANConfig
from alit.reconstruction import distances, reconstruct_lengths, to_float
from alit.tokenizer import Alit
from alit.training.initialization import initialize_locally
from alit.training.objectives import objective_for
from alit.training.recipes import BaseRecipe, DistillRecipe, Recipe
from alit.training.trainer import Trainer, TrainingBatch
from jobs.training.feed import read_validation_images

PHOTOGRAPHS = 64


@pytest.mark.slow
@pytest.mark.unchecked
def test_distillation_halves_its_error(shared):
    """On 64 photographs, the error at the longest length falls below half of its value at step 100."""
    images = read_validation_images(str(shared / "data" / "photos-136" / "val-*.parquet"), size=32, limit=PHOTOGRAPHS)
    assert len(images) == PHOTOGRAPHS
    base = VQGANConfig(channels=(16, 32, 64), blocks=1, latent_dim=16, codebook_size=256, norm_groups=4)
    config = AlitConfig(
        base=base,
        image_size=32,
        width=64,
        depth=2,
        heads=4,
        latents_per_iteration=16,
        iterations=2,
        code_dim=12,
        codebook_size=1024,
    )
    torch.manual_seed(0)
    model = Alit(config)
    common = {"batch_size": 16, "warmup": 20, "learning_rate": 3e-3, "bf16": False, "quantize_from": 100}

    def error(recipe: Recipe, *marks: int) -> list[float]:
        trainer, found = Trainer(model, objective_for(model, recipe), recipe), []
        for step in range(recipe.steps):
            rows = torch.randperm(PHOTOGRAPHS, generator=torch.Generator().manual_seed(step))[:16]
            trainer.train_step(TrainingBatch(images[rows]))
            if step + 1 in marks:
                pixels = to_float(model, images)
                with torch.no_grad():
                    *_, longest = reconstruct_lengths(model, pixels)
                    found.append(float(distances(pixels, longest.images).l1.mean()))
        return found

    error(BaseRecipe(steps=300, **common))
    initialize_locally(model, torch.Generator().manual_seed(0))
    early, late = error(DistillRecipe(steps=550, quantize_over=50, pixel_weight=10.0, pixel_from=0, **common), 100, 550)
    assert late < early / 2, f"L1 {early:.4f} at step 100, {late:.4f} at step 550"
