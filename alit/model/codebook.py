"""The l2-normalised latent codebook.

Shapes: B batch, N latents, C code width, K codebook size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from alit.precision import full_precision, upcast


class Quantized(NamedTuple):
    """A batch of quantized codes.

    Attributes:
        codes_BNC: Unit codebook rows; gradients pass straight through to the unquantized codes.
        ids_BN: The indices of the rows.
        loss: Codebook loss plus 0.25 times the commitment loss, a scalar.
    """

    codes_BNC: Tensor
    ids_BN: Tensor
    loss: Tensor


class LatentCodebook(nn.Module):
    """Nearest-neighbour quantization on the unit sphere (cosine similarity), always in fp32.

    Args:
        size: The number of codes.
        dim: The width of a code.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dim).uniform_(-1 / size, 1 / size))

    def rows(self) -> Float[Tensor, "K C"]:
        """Returns the normalised codebook, as it is compared and decoded."""
        return F.normalize(upcast(self.weight), dim=-1)

    def ids(self, codes_BNC: Float[Tensor, "*batch C"]) -> Int[Tensor, "*batch"]:
        """Returns the index of each code's nearest row; the scale of a code does not matter."""
        with full_precision(codes_BNC):
            return (upcast(codes_BNC) @ self.rows().T).argmax(-1)

    def lookup(self, ids_BN: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch C"]:
        """Returns the normalised codebook rows of ids."""
        return F.normalize(upcast(F.embedding(ids_BN, self.weight)), dim=-1)

    def forward(self, codes_BNC: Float[Tensor, "B N C"], strength: float = 1.0) -> Quantized:
        """Quantizes codes.

        Args:
            codes_BNC: Codes of any scale.
            strength: From 0 (the normalised codes pass through) to 1 (codebook rows), to introduce quantization
                gradually in training.
        """
        with full_precision(codes_BNC):
            unit_BNC = F.normalize(upcast(codes_BNC), dim=-1)
            ids_BN = self.ids(unit_BNC.detach())
            rows_BNC = self.lookup(ids_BN)
            loss = F.mse_loss(rows_BNC, unit_BNC.detach()) + 0.25 * F.mse_loss(unit_BNC, rows_BNC.detach())
            return Quantized(unit_BNC + strength * (rows_BNC - unit_BNC).detach(), ids_BN, loss)
