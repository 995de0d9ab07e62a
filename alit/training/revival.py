"""Maintenance of codebooks outside the gradient: codes that are rarely chosen are replaced.

Shapes: M vectors, C code width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alit.training import distributed


class CodeRevival:
    """Replaces codes that are rarely chosen with vectors of the current batch.

    Counts and vectors come from all workers, so that their codebooks stay equal.

    Args:
        size: The number of rows of the codebook.
        decay: The decay of the moving average of each code's usage.
        every: The number of steps between revivals.
        floor: A code is dead if its usage falls below this share of uniform usage.

    Attributes:
        usage: The moving average of each code's share of all choices.
    """

    def __init__(self, size: int, *, decay: float = 0.99, every: int = 20, floor: float = 0.05) -> None:
        self.decay, self.every, self.floor = decay, every, floor
        self.usage = torch.zeros(size)
        self.vectors: Tensor | None = None
        self._counts: list[Tensor] = []

    def observe(self, ids: Tensor, vectors: Tensor) -> None:
        """Counts the ids [M] of one batch, and keeps the vectors [M, C] that were quantized."""
        ids = ids.reshape(-1)
        counts = ids.new_zeros(len(self.usage), dtype=torch.float32)  # exact to 16.8 M choices
        self._counts.append(counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32)))
        self.vectors = vectors.detach().reshape(-1, vectors.shape[-1])

    @torch.no_grad()
    def revive(self, codebook: Tensor, step: int, generator: torch.Generator) -> None:
        """Updates the usage, and replaces dead codes in place if this step is due.

        Args:
            codebook: The codebook, which may be sharded.
            step: The training step.
            generator: In the same state on every worker.
        """
        if self._counts:
            for counts in distributed.summed(torch.stack(self._counts)).to("cpu", self.usage.dtype):
                self.usage.lerp_(counts / counts.sum(), 1 - self.decay)
            self._counts.clear()
        if (step + 1) % self.every or self.vectors is None:
            return
        dead = (self.usage < self.floor / len(self.usage)).nonzero().squeeze(-1)
        if step > self.every:  # a few at a time, so that the decoder can adapt; all of them at the start
            dead = dead[torch.randperm(len(dead), generator=generator)[: len(self.usage) // 16]]
        vectors = distributed.gathered(self.vectors)
        chosen = torch.randint(len(vectors), (len(dead),), generator=generator)
        rows = distributed.whole(codebook)
        rows[dead.to(rows.device)] = vectors[chosen.to(vectors.device)].to(rows)
        if rows is not codebook:
            codebook.copy_(distributed.sharded_like(rows, codebook))
        self.usage[dead] = 1 / len(self.usage)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state that a checkpoint stores."""
        return {"usage": self.usage.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the output of `state_dict`."""
        self.usage.copy_(state["usage"])
