"""Training objectives: the trained parameters of each stage, and the losses of a step.

An objective computes the losses of one worker's images; losses that are not means over images use
`alit.training.distributed` to include the whole batch.

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
from alit.precision import upcast
from alit.tokenizer import Alit
from alit.training import distributed
from alit.training.adversarial import Adversary, DiscriminatorPerLength, PatchDiscriminator
from alit.training.recipes import AdversarialRecipe, BaseRecipe, DistillRecipe, FinetuneRecipe, Recipe
from alit.training.revival import CodeRevival


class Losses(NamedTuple):
    """The losses of a step.

    Attributes:
        total: The loss to minimize, a scalar.
        parts: Detached scalars to log, by name.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Objective(ABC):
    """The objective of a training stage.

    Attributes:
        adversary: The adversarial losses, if the stage has any.
        revival: The maintenance of the codebook that the stage trains, if any.
    """

    adversary: Adversary | None = None
    revival: CodeRevival | None = None

    @abstractmethod
    def trainable(self, model: Alit) -> list[tuple[str, nn.Parameter]]:
        """Returns the trained parameters, with their names in the model."""

    @abstractmethod
    def losses(self, model: Alit, images: Tensor, step: int, generator: torch.Generator) -> Losses:
        """Computes the losses of a step.

        Args:
            model: The model in training.
            images: Floats [B, 3, H, W] in [0, 1].
            step: The training step.
            generator: In the same state on every worker.
        """

    def codebook(self, model: Alit) -> Tensor:
        """Returns the codebook that `revival` maintains."""
        assert model.codebook is not None
        return model.codebook.weight

    def after_step(self, model: Alit, step: int, generator: torch.Generator) -> None:
        """Maintains the codebook after an optimizer step."""
        if self.revival is not None:
            self.revival.revive(self.codebook(model), step, generator)


def objective_for(model: Alit, recipe: Recipe, perceptual: Perceptual | None = None) -> Objective:
    """Creates the objective of a recipe's stage; `perceptual` is LPIPS, which distillation does not use."""
    if isinstance(recipe, BaseRecipe):
        return BaseObjective(model, recipe, perceptual)
    if isinstance(recipe, FinetuneRecipe):
        return FinetuneObjective(model, recipe, perceptual)
    assert isinstance(recipe, DistillRecipe)
    return DistillObjective(model, recipe)


def no_decay(name: str, parameter: nn.Parameter) -> bool:
    """Returns whether a parameter is exempt from weight decay: vectors, embeddings and codebooks."""
    return parameter.ndim < 2 or "codebook" in name or "position" in name or "embedding" in name or "token" in name


def _used(model: Alit, name: str) -> bool:
    """Returns whether a parameter affects the output: the mask token is used with halting only."""
    return name != "encoder.mask_token" or model.config.halting != "off"


def _halting_noise(model: Alit, count: int, generator: torch.Generator) -> Tensor | None:
    """Draws noise for the whole batch and returns that of this worker's images, [K, B, G]; None unless sampled."""
    if model.config.halting != "sampled":
        return None
    batch = count * distributed.workers()
    noise = torch.rand(model.config.iterations, batch, model.config.grid**2, generator=generator)
    return distributed.own_rows(noise, dim=1).to(model.encoder.positions.device)


class PixelLoss:
    """L1, LPIPS and adversarial loss on decoded images.

    Args:
        recipe: The recipe of the stage.
        perceptual: LPIPS, if available.
        lengths: The number of lengths that the discriminator distinguishes.
    """

    def __init__(self, recipe: AdversarialRecipe, perceptual: Perceptual | None, lengths: int) -> None:
        self.perceptual, self.perceptual_weight = perceptual, recipe.perceptual_weight
        self.adversary = None
        if recipe.gan_weight:
            size = {"width": recipe.discriminator_width, "layers": recipe.discriminator_layers}
            kind = PatchDiscriminator if recipe.discriminator == "shared" else DiscriminatorPerLength
            # initial values depend on the recipe's seed only
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed)
                discriminator = kind(lengths, **size)
            self.adversary = Adversary(
                discriminator, weight=recipe.gan_weight, start=recipe.gan_from, ramp=recipe.gan_ramp
            )

    def __call__(self, model: Alit, images: Tensor, decoded: Tensor, length: int, step: int) -> Losses:
        """Returns the losses of decoded images at the length of index `length`."""
        decoded = upcast(decoded)
        total = l1 = (decoded - images).abs().mean()
        parts = {"l1": l1.detach()}
        if self.perceptual is not None and self.perceptual_weight:
            perceptual = self.perceptual(images, decoded).mean()
            total = total + self.perceptual_weight * perceptual
            parts["perceptual"] = perceptual.detach()
        if self.adversary is not None:
            adversarial = self.adversary.generator_loss(images, decoded, length, step, total, model.base.last_layer)
            if adversarial is not None:
                total = total + adversarial
                parts["gan"] = adversarial.detach()
        return Losses(total, parts)


class BaseObjective(Objective):
    """Trains the base tokenizer: pixel losses, and codebook and commitment loss or KL divergence."""

    def __init__(self, model: Alit, recipe: BaseRecipe, perceptual: Perceptual | None = None) -> None:
        self.recipe = recipe
        self.pixels = PixelLoss(recipe, perceptual, lengths=1)
        self.adversary = self.pixels.adversary
        discrete = isinstance(model.base, VQGAN)
        self.revival = CodeRevival(model.base.prediction_dim) if discrete else None

    def trainable(self, model: Alit) -> list[tuple[str, nn.Parameter]]:
        """See `Objective`."""
        return [(f"base.{name}", parameter) for name, parameter in model.base.named_parameters()]

    def codebook(self, model: Alit) -> Tensor:
        """See `Objective`."""
        assert isinstance(model.base, VQGAN)
        return model.base.codebook.weight

    def losses(self, model: Alit, images: Tensor, step: int, generator: torch.Generator) -> Losses:
        """See `Objective`."""
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
        latents, rows = upcast(tokens.latents_BDhw), upcast(tokens.target_BDhw)
        # at first without quantization and commitment: a codebook that applies too early collapses the latents into the
        # few dimensions of colour, and they do not recover
        quantized = step >= self.recipe.quantize_from
        loss = F.mse_loss(rows, latents.detach())
        if quantized:
            loss = loss + self.recipe.commitment * F.mse_loss(latents, rows.detach())
        self.revival.observe(tokens.ids_BG, rearrange(latents, "b d h w -> (b h w) d"))
        return latents + (rows - latents).detach() if quantized else latents, loss, "codebook"

    def _continuous(self, base: KL, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, str]:
        mean, log_variance = (upcast(part) for part in base.posterior(images))
        shape = (len(mean) * distributed.workers(), *mean.shape[1:])
        noise = distributed.own_rows(torch.randn(shape, generator=generator)).to(mean)
        latents = (mean + (0.5 * log_variance).exp() * noise) * base.latent_scale
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
        return latents, self.recipe.kl_weight * divergence, "kl"


class DistillObjective(Objective):
    """Trains latent distillation on a frozen base: its tokens are predicted from the latents of each iteration."""

    def __init__(self, model: Alit, recipe: DistillRecipe) -> None:
        self.recipe = recipe
        self.iterations = min(recipe.grad_iterations or model.config.iterations, model.config.iterations)
        size = model.config.codebook_size
        self.revival = CodeRevival(size, floor=0.15) if size else None

    def trainable(self, model: Alit) -> list[tuple[str, nn.Parameter]]:
        """See `Objective`."""
        named = model.named_parameters()
        return [(name, p) for name, p in named if not name.startswith("base.") and _used(model, name)]

    def _supervised(self, iterations: int, generator: torch.Generator) -> list[int]:
        """Draws the iterations, from 0, that a step supervises; the rollout ends at the last one."""
        depth = iterations
        if self.recipe.sample_depth:
            depth = 1 + int(torch.randint(iterations, (), generator=generator))
        return sorted(torch.randperm(depth, generator=generator)[: self.iterations].tolist())

    def losses(self, model: Alit, images: Tensor, step: int, generator: torch.Generator) -> Losses:
        """See `Objective`."""
        recipe = self.recipe
        with torch.no_grad():
            base = model.base.encode(images)
            base = BaseTokens(upcast(base.latents_BDhw), upcast(base.target_BDhw), base.ids_BG)
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
            predictions = upcast(output.predictions_BGO)
            latents = model.base.predicted(predictions, "soft")
            latent = F.mse_loss(upcast(latents), base.target_BDhw) / spread
            parts[f"latent_{k}"] = latent.detach()
            loss = recipe.latent_weight * latent
            if base.ids_BG is not None:
                code = F.cross_entropy(predictions.flatten(0, 1), base.ids_BG.flatten())
                loss = loss + recipe.code_weight * code
                parts[f"code_{k}"] = code.detach()
            if recipe.pixel_weight and step >= recipe.pixel_from and k == with_pixels:
                l1 = (upcast(model.base.decode(latents)) - images).abs().mean()
                loss = loss + recipe.pixel_weight * l1
                parts["l1"] = l1.detach()
            weight = recipe.iteration_weights[k] if k < len(recipe.iteration_weights) else 1.0
            total = total + weight * loss + output.quantizer_loss
            if self.revival is not None and output.ids_BN is not None:
                self.revival.observe(output.ids_BN, F.normalize(upcast(output.unquantized_BNC), dim=-1))
        return Losses(total, parts)


class FinetuneObjective(Objective):
    """Trains the whole model on the pixels of one length per step, each length in turn.

    The base's codebook stays frozen, as predictions are mixtures of its rows.
    """

    def __init__(self, model: Alit, recipe: FinetuneRecipe, perceptual: Perceptual | None = None) -> None:
        self.pixels = PixelLoss(recipe, perceptual, lengths=model.config.iterations)
        self.adversary = self.pixels.adversary
        size = model.config.codebook_size
        self.revival = CodeRevival(size) if size else None

    def trainable(self, model: Alit) -> list[tuple[str, nn.Parameter]]:
        """See `Objective`."""
        frozen = "base.codebook.weight"
        return [(name, p) for name, p in model.named_parameters() if name != frozen and _used(model, name)]

    def losses(self, model: Alit, images: Tensor, step: int, generator: torch.Generator) -> Losses:
        """See `Objective`."""
        k = step % model.config.iterations
        base = model.base.encode(images)
        noise = _halting_noise(model, len(images), generator)
        *_, output = model.rollout(images, base=base, iterations=k + 1, predict=[k], halting_noise=noise)
        assert output.predictions_BGO is not None
        predictions = upcast(output.predictions_BGO)
        losses = self.pixels(model, images, model.base.decode(model.base.predicted(predictions, "soft")), k, step)
        total = losses.total + output.quantizer_loss
        parts = losses.parts | {"quantizer": output.quantizer_loss.detach()}
        if self.revival is not None and output.ids_BN is not None:
            self.revival.observe(output.ids_BN, F.normalize(upcast(output.unquantized_BNC), dim=-1))
        return Losses(total, {f"{name}_{k}" if name == "l1" else name: value for name, value in parts.items()})
