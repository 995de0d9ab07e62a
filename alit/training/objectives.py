"""Training objectives: what each stage trains, and one step's losses.

An objective sees the images of one worker; where its losses are no means over images, it asks `alit.distributed` for
the whole batch.

Shapes: B batch, G base tokens, O prediction width, K iterations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from alit.metrics.lpips import Perceptual
from alit.model.base import BaseTokens
from alit.model.kl import KL
from alit.model.vqgan import VQGAN
from alit.tokenizer import Alit
from alit.training import distributed
from alit.training.adversarial import Adversary, DiscriminatorPerLength, PatchDiscriminator
from alit.training.recipes import AdversarialRecipe, BaseRecipe, DistillRecipe, FinetuneRecipe, Recipe
from alit.training.revival import CodeRevival


class Losses(NamedTuple):
    total: Tensor
    parts: dict[str, Tensor]
    """Detached scalars to log."""


class Objective(ABC):
    """A training stage: which parameters it trains and what it asks of them.

    Attributes:
        adversary: the discriminator's side, where the stage has one.
        revival: the upkeep of the codebook that it trains, where there is one.
    """

    adversary: Adversary | None = None
    revival: CodeRevival | None = None

    @abstractmethod
    def trainable(self, model: Alit) -> list[tuple[str, nn.Parameter]]:
        """The parameters that it trains, under their names in the model."""

    @abstractmethod
    def losses(self, model: Alit, images: Tensor, step: int, generator: torch.Generator) -> Losses:
        """Of float images [B, 3, H, W] in [0, 1]; the generator is in the same state on every worker."""

    def codebook(self, model: Alit) -> Tensor:
        """What `revival` keeps in use."""
        assert model.codebook is not None
        return model.codebook.weight

    def after_step(self, model: Alit, step: int, generator: torch.Generator) -> None:
        """Upkeep outside the gradient."""
        if self.revival is not None:
            self.revival.revive(self.codebook(model), step, generator)


def objective_for(model: Alit, recipe: Recipe, perceptual: Perceptual | None = None) -> Objective:
    """The objective that a recipe describes."""
    if isinstance(recipe, BaseRecipe):
        return BaseObjective(model, recipe, perceptual)
    if isinstance(recipe, FinetuneRecipe):
        return FinetuneObjective(model, recipe, perceptual)
    assert isinstance(recipe, DistillRecipe)
    return DistillObjective(model, recipe)


def no_decay(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim < 2 or "codebook" in name or "position" in name or "embedding" in name or "token" in name


def _used(model: Alit, name: str) -> bool:
    """Whether a parameter takes part at all: image tokens are masked with halting only."""
    return name != "encoder.mask_token" or model.config.halting != "off"


def _halting_noise(model: Alit, count: int, generator: torch.Generator) -> Tensor | None:
    """Noise for this worker's images out of what was drawn for the whole batch, [K, B, G]."""
    if model.config.halting != "sampled":
        return None
    batch = count * distributed.workers()
    noise = torch.rand(model.config.iterations, batch, model.config.grid**2, generator=generator)
    return distributed.own_rows(noise, dim=1).to(model.encoder.positions.device)


class PixelLoss:
    """L1, LPIPS and the adversary on decoded images, shared by the stages that look at pixels."""

    def __init__(self, recipe: AdversarialRecipe, perceptual: Perceptual | None, lengths: int) -> None:
        self.perceptual, self.perceptual_weight = perceptual, recipe.perceptual_weight
        self.adversary = None
        if recipe.gan_weight:
            size = {"width": recipe.discriminator_width, "layers": recipe.discriminator_layers}
            kind = PatchDiscriminator if recipe.discriminator == "shared" else DiscriminatorPerLength
            # initial values from the recipe's seed, whatever was drawn before
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed)
                discriminator = kind(lengths, **size)
            self.adversary = Adversary(
                discriminator, weight=recipe.gan_weight, start=recipe.gan_from, ramp=recipe.gan_ramp
            )

    def __call__(self, model: Alit, images: Tensor, decoded: Tensor, length: int, step: int) -> Losses:
        decoded = decoded.float()
        total = l1 = (decoded - images).abs().mean()
        parts = {"l1": l1.detach()}
        if self.perceptual is not None and self.perceptual_weight:
            perceptual = self.perceptual(images, decoded).mean()
            total = total + self.perceptual_weight * perceptual
            parts["perceptual"] = perceptual.detach()
        if self.adversary is not None:
            pull = self.adversary.generator_loss(images, decoded, length, step, total, model.base.last_layer)
            if pull is not None:
                total = total + pull
                parts["gan"] = pull.detach()
        return Losses(total, parts)


class BaseObjective(Objective):
    """The base tokenizer from pixels: reconstruction, and codebook and commitment loss or KL divergence."""

    def __init__(self, model: Alit, recipe: BaseRecipe, perceptual: Perceptual | None = None) -> None:
        self.recipe = recipe
        self.pixels = PixelLoss(recipe, perceptual, lengths=1)
        self.adversary = self.pixels.adversary
        discrete = isinstance(model.base, VQGAN)
        self.revival = CodeRevival(model.base.prediction_dim) if discrete else None

    def trainable(self, model: Alit) -> list[tuple[str, nn.Parameter]]:
        return [(f"base.{name}", parameter) for name, parameter in model.base.named_parameters()]

    def codebook(self, model: Alit) -> Tensor:
        assert isinstance(model.base, VQGAN)
        return model.base.codebook.weight

    def losses(self, model: Alit, images: Tensor, step: int, generator: torch.Generator) -> Losses:
        latents, extra, name = (
            self._discrete(model.base, images, step)
            if isinstance(model.base, VQGAN)
            else self._continuous(model.base, images, generator)
        )
        losses = self.pixels(model, images, model.base.decode(latents), 0, step)
        return Losses(losses.total + extra, losses.parts | {name: extra.detach()})

    def _discrete(self, base: VQGAN, images: Tensor, step: int) -> tuple[Tensor, Tensor, str]:
        tokens = base.encode(images)
        assert tokens.ids_BG is not None
        assert self.revival is not None
        latents, rows = tokens.latents_BDhw.float(), tokens.target_BDhw.float()
        # without quantization first, and without commitment: too early a codebook folds the latents into the few
        # dimensions of colour, and they stay there
        quantized = step >= self.recipe.quantize_from
        loss = F.mse_loss(rows, latents.detach())
        if quantized:
            loss = loss + self.recipe.commitment * F.mse_loss(latents, rows.detach())
        self.revival.observe(tokens.ids_BG, rearrange(latents, "b d h w -> (b h w) d"))
        return latents + (rows - latents).detach() if quantized else latents, loss, "codebook"

    def _continuous(self, base: KL, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, str]:
        mean, log_variance = (part.float() for part in base.posterior(images))
        shape = (len(mean) * distributed.workers(), *mean.shape[1:])
        noise = distributed.own_rows(torch.randn(shape, generator=generator)).to(mean)
        latents = (mean + (0.5 * log_variance).exp() * noise) * base.latent_scale
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
        return latents, self.recipe.kl_weight * divergence, "kl"


class DistillObjective(Objective):
    """The first stage: on a frozen base, predict its tokens from the latents of all or some iterations."""

    def __init__(self, model: Alit, recipe: DistillRecipe) -> None:
        self.recipe = recipe
        self.iterations = min(recipe.grad_iterations or model.config.iterations, model.config.iterations)
        size = model.config.codebook_size
        self.revival = CodeRevival(size, floor=0.15) if size else None

    def trainable(self, model: Alit) -> list[tuple[str, nn.Parameter]]:
        named = model.named_parameters()
        return [(name, p) for name, p in named if not name.startswith("base.") and _used(model, name)]

    def _supervised(self, iterations: int, generator: torch.Generator) -> list[int]:
        """Which iterations, from 0, this step supervises; the last of them is the rollout's depth."""
        depth = iterations
        if self.recipe.sample_depth:
            depth = 1 + int(torch.randint(iterations, (), generator=generator))
        return sorted(torch.randperm(depth, generator=generator)[: self.iterations].tolist())

    def losses(self, model: Alit, images: Tensor, step: int, generator: torch.Generator) -> Losses:
        recipe = self.recipe
        with torch.no_grad():
            base = model.base.encode(images)
            base = BaseTokens(base.latents_BDhw.float(), base.target_BDhw.float(), base.ids_BG)
            mean = distributed.averaged(base.target_BDhw.mean())
            spread = distributed.averaged((base.target_BDhw - mean).square().mean())
            spread = spread.clamp_min(1e-8)  # an untrained base may choose one code only
        chosen = self._supervised(model.config.iterations, generator)
        with_pixels = chosen[int(torch.randint(len(chosen), (), generator=generator))]
        total = images.new_zeros(())
        parts: dict[str, Tensor] = {}
        rollout = model.rollout(
            images,
            base=base,
            iterations=chosen[-1] + 1,
            predict=chosen,
            halting_noise=_halting_noise(model, len(images), generator),
            strength=min(1.0, max(0.0, (step - recipe.quantize_from + 1) / recipe.quantize_over)),
        )
        for k, output in enumerate(rollout):
            if k not in chosen:
                continue
            assert output.predictions_BGO is not None
            predictions = output.predictions_BGO.float()
            latents = model.base.predicted(predictions, "soft")
            latent = F.mse_loss(latents.float(), base.target_BDhw) / spread
            parts[f"latent_{k}"] = latent.detach()
            loss = recipe.latent_weight * latent
            if base.ids_BG is not None:
                code = F.cross_entropy(predictions.flatten(0, 1), base.ids_BG.flatten())
                loss = loss + recipe.code_weight * code
                parts[f"code_{k}"] = code.detach()
            if recipe.pixel_weight and step >= recipe.pixel_from and k == with_pixels:
                l1 = (model.base.decode(latents).float() - images).abs().mean()
                loss = loss + recipe.pixel_weight * l1
                parts["l1"] = l1.detach()
            weight = recipe.iteration_weights[k] if k < len(recipe.iteration_weights) else 1.0
            total = total + weight * loss + output.quantizer_loss
            if self.revival is not None and output.ids_BN is not None:
                self.revival.observe(output.ids_BN, F.normalize(output.unquantized_BNC.float(), dim=-1))
        return Losses(total, parts)


class FinetuneObjective(Objective):
    """Everything trained on the pixels of one length per step, each length in turn (the second stage).

    The base's codebook stays: predictions are mixtures of its rows.
    """

    def __init__(self, model: Alit, recipe: FinetuneRecipe, perceptual: Perceptual | None = None) -> None:
        self.pixels = PixelLoss(recipe, perceptual, lengths=model.config.iterations)
        self.adversary = self.pixels.adversary
        size = model.config.codebook_size
        self.revival = CodeRevival(size) if size else None

    def trainable(self, model: Alit) -> list[tuple[str, nn.Parameter]]:
        frozen = "base.codebook.weight"
        return [(name, p) for name, p in model.named_parameters() if name != frozen and _used(model, name)]

    def losses(self, model: Alit, images: Tensor, step: int, generator: torch.Generator) -> Losses:
        k = step % model.config.iterations
        base = model.base.encode(images)
        noise = _halting_noise(model, len(images), generator)
        *_, output = model.rollout(images, base=base, iterations=k + 1, predict=[k], halting_noise=noise)
        assert output.predictions_BGO is not None
        predictions = output.predictions_BGO.float()
        losses = self.pixels(model, images, model.base.decode(model.base.predicted(predictions, "soft")), k, step)
        total = losses.total + output.quantizer_loss
        parts = losses.parts | {"quantizer": output.quantizer_loss.detach()}
        if self.revival is not None and output.ids_BN is not None:
            self.revival.observe(output.ids_BN, F.normalize(output.unquantized_BNC.float(), dim=-1))
        return Losses(total, {f"{name}_{k}" if name == "l1" else name: value for name, value in parts.items()})
