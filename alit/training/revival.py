"""Upkeep of codebooks outside the gradient: a code that is hardly ever chosen is moved to where it is needed.

Shapes: M vectors, C code width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alit.training import distributed


class CodeRevival:
    """Keeps every code in use: a code that is hardly ever chosen is moved onto a vector of the current batch.

    Counts and vectors are those of all workers' shares, so that every worker's codebook stays the same.

    Args:
        size: rows of the codebook.
        decay: of the running share that each code has of the choices.
        every: steps between revivals.
        floor: share of an even use below which a code counts as dead.
    """

    def __init__(self, size: int, *, decay: float = 0.99, every: int = 20, floor: float = 0.05) -> None:
        self.decay, self.every, self.floor = decay, every, floor
        self.usage = torch.zeros(size)
        self.vectors: Tensor | None = None
        self._counts: list[Tensor] = []

    def observe(self, ids: Tensor, vectors: Tensor) -> None:
        """Counts one batch: ids [M] and the vectors [M, C] that they were chosen for."""
        ids = ids.reshape(-1)
        counts = ids.new_zeros(len(self.usage), dtype=torch.float32)  # exact to 16.8 M choices
        self._counts.append(counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32)))
        self.vectors = vectors.detach().reshape(-1, vectors.shape[-1])

    @torch.no_grad()
    def revive(self, codebook: Tensor, step: int, generator: torch.Generator) -> None:
        """Takes in what was observed, and moves dead codes where this step is one at which that is done."""
        if self._counts:
            for counts in distributed.summed(torch.stack(self._counts)).to("cpu", self.usage.dtype):
                self.usage.lerp_(counts / counts.sum(), 1 - self.decay)
            self._counts.clear()
        if (step + 1) % self.every or self.vectors is None:
            return
        dead = (self.usage < self.floor / len(self.usage)).nonzero().squeeze(-1)
        if step > self.every:  # a few at a time, so that the decoder can follow; all of them to begin with
            dead = dead[torch.randperm(len(dead), generator=generator)[: len(self.usage) // 16]]
        vectors = distributed.gathered(self.vectors)
        chosen = torch.randint(len(vectors), (len(dead),), generator=generator)
        rows = distributed.whole(codebook)
        rows[dead.to(rows.device)] = vectors[chosen.to(vectors.device)].to(rows)
        if rows is not codebook:
            codebook.copy_(distributed.sharded_like(rows, codebook))
        self.usage[dead] = 1 / len(self.usage)

    def state_dict(self) -> dict[str, Tensor]:
        return {"usage": self.usage.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.usage.copy_(state["usage"])
