"""Training objectives: one step's losses for the base tokenizer and for the latent distillation.

Shapes: B batch, G base tokens, O prediction width, K codebook size, C code width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from alit.base import VQGAN, BaseTokens
from alit.tokenizer import Alit

PUBLISHED_WEIGHTS = (2.5, 2.0, 1.5, 1.25)
"""Cross-entropy weights of the first iterations in the published first stage; 1 from there on."""


class Losses(NamedTuple):
    total: Tensor
    parts: dict[str, Tensor]
    """Detached scalars to log."""


@runtime_checkable
class Objective(Protocol):
    """A training stage: which parameters it trains and what it asks of them."""

    def trainable(self, model: Alit) -> list[tuple[str, nn.Parameter]]: ...

    def losses(self, model: Alit, images: Tensor, step: int, generator: torch.Generator) -> Losses: ...

    def after_step(self, step: int, generator: torch.Generator) -> None:
        """Upkeep outside the gradient."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class CodeRevival:
    """Keeps every code in use: a code that is hardly ever chosen is moved onto a vector of the current batch."""

    def __init__(self, codebook: Tensor, *, decay: float = 0.99, every: int = 20, floor: float = 0.05) -> None:
        self.codebook = codebook
        self.decay, self.every, self.floor = decay, every, floor
        self.usage = torch.zeros(len(codebook))
        self.vectors = torch.zeros(0, codebook.shape[1])

    def observe(self, ids: Tensor, vectors: Tensor) -> None:
        """Counts one batch: ids [M] and the vectors [M, C] that they were chosen for."""
        counts = torch.bincount(ids.reshape(-1), minlength=len(self.usage)).to(self.usage.dtype).cpu()
        self.usage.lerp_(counts / counts.sum(), 1 - self.decay)
        self.vectors = vectors.detach().reshape(-1, vectors.shape[-1])

    @torch.no_grad()
    def revive(self, step: int, generator: torch.Generator) -> None:
        if (step + 1) % self.every or not len(self.vectors):
            return
        dead = (self.usage < self.floor / len(self.usage)).nonzero().squeeze(-1)
        if step > self.every:  # a few at a time, so that the decoder can follow; all of them to begin with
            dead = dead[torch.randperm(len(dead), generator=generator)[: len(self.usage) // 16]]
        chosen = torch.randint(len(self.vectors), (len(dead),), generator=generator)
        self.codebook[dead] = self.vectors[chosen].to(self.codebook.dtype)
        self.usage[dead] = 1 / len(self.usage)


def no_decay(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim < 2 or "codebook" in name or "position" in name or "embedding" in name or "token" in name


class BaseObjective:
    """L1, codebook and commitment loss of the VQGAN base."""

    def __init__(self, model: Alit, *, commitment: float = 0.1, quantize_from: int = 300) -> None:
        assert isinstance(model.base, VQGAN), "only a VQGAN base is trained from pixels"
        self.commitment = commitment
        self.quantize_from = quantize_from
        self.revival = CodeRevival(model.base.codebook.weight)

    def trainable(self, model: Alit) -> list[tuple[str, nn.Parameter]]:
        return list(model.base.named_parameters())

    def losses(self, model: Alit, images: Tensor, step: int, generator: torch.Generator) -> Losses:
        assert isinstance(model.base, VQGAN)
        base = model.base.encode(images)
        assert base.ids_BG is not None
        latents, rows = base.latents_BDhw.float(), base.target_BDhw.float()
        # without quantization first, and without commitment: too early a codebook folds the latents into the few
        # dimensions of colour, and they stay there
        quantized = step >= self.quantize_from
        decoded = latents + (rows - latents).detach() if quantized else latents
        l1 = (model.base.decode(decoded).float() - images).abs().mean()
        codebook = F.mse_loss(rows, latents.detach())
        commitment = F.mse_loss(latents, rows.detach()) if quantized else latents.new_zeros(())
        self.revival.observe(base.ids_BG, rearrange(latents, "b d h w -> (b h w) d"))
        total = l1 + codebook + self.commitment * commitment
        return Losses(total, {"l1": l1.detach(), "codebook": codebook.detach()})

    def after_step(self, step: int, generator: torch.Generator) -> None:
        self.revival.revive(step, generator)

    def state_dict(self) -> dict[str, Tensor]:
        return {"usage": self.revival.usage}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.revival.usage.copy_(state["usage"])


class DistillObjective:
    """Latent distillation on a frozen base: predict its tokens from the latents of some iterations (the first stage).

    Args:
        iterations: how many of the iterations are supervised each step, drawn at random; None for all of them.
        quantize_from, quantize_over: steps at which, and over how many, codes go from continuous to quantized.
        latent_weight: of the squared error of the predicted base latents, relative to their variance.
        pixel_weight: of the L1 error of the decoded image, for one of the supervised iterations.
        pixel_from: the step from which pixels count.
        iteration_weights: of each iteration's loss; 1 where the list ends.
    """

    def __init__(
        self,
        model: Alit,
        *,
        iterations: int | None = None,
        quantize_from: int = 0,
        quantize_over: int = 1,
        code_weight: float = 1.0,
        latent_weight: float = 1.0,
        pixel_weight: float = 0.0,
        pixel_from: int = 0,
        iteration_weights: Sequence[float] = PUBLISHED_WEIGHTS,
    ) -> None:
        self.iterations = iterations or model.config.iterations
        self.quantize_from, self.quantize_over = quantize_from, quantize_over
        self.code_weight, self.latent_weight = code_weight, latent_weight
        self.pixel_weight, self.pixel_from = pixel_weight, pixel_from
        self.iteration_weights = tuple(iteration_weights)
        self.revival = CodeRevival(model.codebook.weight, floor=0.15) if model.codebook is not None else None

    def trainable(self, model: Alit) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in model.named_parameters() if not name.startswith("base.")]

    def losses(self, model: Alit, images: Tensor, step: int, generator: torch.Generator) -> Losses:
        with torch.no_grad():
            base = model.base.encode(images)
            base = BaseTokens(base.latents_BDhw.float(), base.target_BDhw.float(), base.ids_BG)
            spread = base.target_BDhw.var().clamp_min(1e-8)  # an untrained base may choose one code only
        count = model.config.iterations
        chosen = sorted(torch.randperm(count, generator=generator)[: self.iterations].tolist())
        with_pixels = chosen[int(torch.randint(len(chosen), (), generator=generator))]
        strength = min(1.0, max(0.0, (step - self.quantize_from + 1) / self.quantize_over))
        halting_noise = generator if model.config.halting == "sampled" else None
        total = images.new_zeros(())
        parts: dict[str, Tensor] = {}
        rollout = model.rollout(
            images, base=base, iterations=chosen[-1] + 1, predict=chosen, generator=halting_noise, strength=strength
        )
        for k, output in enumerate(rollout):
            if k not in chosen:
                continue
            assert output.predictions_BGO is not None
            predictions = output.predictions_BGO.float()
            latents = model.base.predicted(predictions, "soft")
            latent = F.mse_loss(latents, base.target_BDhw) / spread
            parts[f"latent_{k}"] = latent.detach()
            loss = self.latent_weight * latent
            if base.ids_BG is not None:
                code = F.cross_entropy(predictions.flatten(0, 1), base.ids_BG.flatten())
                loss = loss + self.code_weight * code
                parts[f"code_{k}"] = code.detach()
            if self.pixel_weight and step >= self.pixel_from and k == with_pixels:
                l1 = (model.base.decode(latents).float() - images).abs().mean()
                loss = loss + self.pixel_weight * l1
                parts["l1"] = l1.detach()
            weight = self.iteration_weights[k] if k < len(self.iteration_weights) else 1.0
            total = total + weight * loss + output.quantizer_loss
            if self.revival is not None and output.ids_BN is not None:
                self.revival.observe(output.ids_BN, F.normalize(output.unquantized_BNC.float(), dim=-1))
        return Losses(total, parts)

    def after_step(self, step: int, generator: torch.Generator) -> None:
        if self.revival is not None:
            self.revival.revive(step, generator)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.revival is None else {"usage": self.revival.usage}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.revival is not None:
            self.revival.usage.copy_(state["usage"])
