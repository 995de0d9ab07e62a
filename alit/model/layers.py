"""The transformer block shared by the encoder and the decoder.

Shapes: B batch, S sequence, D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Full multi-head self-attention with one fused projection, q, k and v stacked in that order.

    Args:
        width: The width of the sequence.
        heads: The number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def _heads(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x_BSD), "b s (three h d) -> three b h s d", three=3, h=self.heads)
        return q, k, v

    def forward(self, x_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Returns the attention's output, without the residual."""
        q, k, v = self._heads(x_BSD)
        if x_BSD.device.type == "cpu" and q.dtype == torch.bfloat16:
            # in the backward pass, the CPU's fused kernel takes five times as long in bf16 as in fp32
            with torch.autocast("cpu", enabled=False):
                mixed = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(mixed, "b h s d -> b s (h d)"))

    def weights(self, x_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B H S S"]:
        """Returns the attention probabilities that `forward` uses internally; rows sum to 1."""
        q, k, _ = self._heads(x_BSD)
        return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a GELU MLP of four times the width.

    Args:
        width: The width of the sequence.
        heads: The number of attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.recompute = False
        """Activation checkpointing: keep only the block's input, and recompute the rest in the backward pass."""

    def forward(self, x_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Returns the block's output."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x_BSD, use_reentrant=False)
        return self._forward(x_BSD)

    def _forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.norm_attention(x_BSD))
        return x_BSD + self.mlp(self.norm_mlp(x_BSD))
