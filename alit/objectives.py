"""Training objectives: one step's losses for the base tokenizer and for the latent distillation.

Shapes: B batch, G base tokens, O prediction width, K codebook size, C code width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

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
        if step % self.every or not len(self.vectors):
            return
        dead = (self.usage < self.floor / len(self.usage)).nonzero().squeeze(-1)
        if step > 0:  # a few at a time, so that the decoder can follow; all of them to begin with
            dead = dead[torch.randperm(len(dead), generator=generator)[: len(self.usage) // 16]]
        chosen = torch.randint(len(self.vectors), (len(dead),), generator=generator)
        self.codebook[dead] = self.vectors[chosen].to(self.codebook.dtype)
        self.usage[dead] = 1 / len(self.usage)


def _no_decay(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim < 2 or "codebook" in name or "position" in name or "embedding" in name or "token" in name


class BaseObjective:
    """L1, codebook and commitment loss of the VQGAN base."""

    def __init__(self, model: Alit, *, commitment: float = 0.25, quantize_from: int = 300) -> None:
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
        if step >= self.quantize_from:
            decoded = latents + (rows - latents).detach()
        else:
            decoded = latents
        l1 = (model.base.decode(decoded).float() - images).abs().mean()
        codebook = F.mse_loss(rows, latents.detach())
        commitment = F.mse_loss(latents, rows.detach())
        self.revival.observe(base.ids_BG, rearrange(latents, "b d h w -> (b h w) d"))
        total = l1 + codebook + self.commitment * commitment
        return Losses(total, {"l1": l1.detach(), "codebook": codebook.detach()})

    def after_step(self, step: int, generator: torch.Generator) -> None:
        self.revival.revive(step, generator)

    def state_dict(self) -> dict[str, Tensor]:
        return {"usage": self.revival.usage}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.revival.usage.copy_(state["usage"])
