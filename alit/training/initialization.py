"""Initial values from which a small model learns to route within minutes instead of hours.

Published initial values give every token a random position, and the model must first discover which latent should look
where. Here positions are Fourier features of the place (so that near places resemble each other), the latents of each
iteration start spread over the image, and every attention block starts out looking at what resembles it (after
Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers"). The architecture is unchanged, and all of
it stays free to move.

Shapes: G base tokens, n latents per iteration, K iterations, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alit.model.config import AlitConfig
from alit.model.layers import Attention, Block
from alit.tokenizer import Alit

REACH = 1.0
"""Distance in base tokens at which two places stop resembling each other."""
FOCUS = 1.3
"""Scale of queries and keys: how sharply attention starts out on what resembles the query."""
COPY = 0.5
"""How much of what it attends to an attention block adds at the start."""


def _places(config: AlitConfig) -> tuple[Tensor, Tensor]:
    """Where base tokens [G, 2] and the latents of each iteration [K, n, 2] lie, in base tokens."""
    line = torch.arange(config.grid) + 0.5
    tokens = torch.cartesian_prod(line, line)
    new = config.latents_per_iteration
    rows = max(r for r in range(1, math.isqrt(new) + 1) if new % r == 0)  # the squarest arrangement of n places
    height, width = config.grid / rows, config.grid / (new // rows)
    centers = torch.cartesian_prod((torch.arange(rows) + 0.5) * height, (torch.arange(new // rows) + 0.5) * width)
    # later iterations shift their latents within each patch, on a spiral that covers it evenly
    k = torch.arange(config.iterations)
    side = math.ceil(math.sqrt(config.iterations))
    shifts = torch.stack([(k // side + 0.5) / side - 0.5, (k % side + 0.5) / side - 0.5], dim=-1)
    return tokens, centers + 0.8 * shifts[:, None] * torch.tensor([height, width])


@torch.no_grad()
def initialize_locally(model: Alit, generator: torch.Generator) -> None:
    """Overwrites the initial values of a model's encoder and decoder, in place."""
    config, width = model.config, model.config.width
    frequencies = torch.randn(2, width // 2, generator=generator) / REACH

    def features(places: Tensor) -> Tensor:
        angles = places @ frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1) * (2 / width) ** 0.5

    tokens, latents = _places(config)
    encoder, decoder = model.encoder, model.decoder
    at_tokens, at_latents = features(tokens), features(latents)
    encoder.positions[1:] = at_tokens
    encoder.latent_positions.copy_(at_latents.mean(0))
    encoder.iteration_embedding.copy_(at_latents - at_latents.mean(0))
    encoder.latent_tokens.mul_(0.2)
    decoder.positions[1:] = at_tokens
    decoder.code_positions.copy_(at_latents.flatten(0, 1))
    decoder.mask_token.mul_(0.2)
    torch.nn.init.normal_(decoder.code_embed.weight, std=width**-0.5, generator=generator)
    for block in [*encoder.blocks, *decoder.blocks]:
        assert isinstance(block, Block)
        _look_at_alike(block.attention, width, generator)


def _look_at_alike(attention: Attention, width: int, generator: torch.Generator) -> None:
    query, key, value = attention.qkv.weight.view(3, width, width)
    per_head = width // attention.heads
    for head in range(attention.heads):
        basis = torch.linalg.qr(torch.randn(width, per_head, generator=generator)).Q.T * FOCUS
        rows = slice(head * per_head, (head + 1) * per_head)
        query[rows], key[rows] = basis, basis
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    value.copy_(rotation)
    attention.out.weight.copy_(COPY * rotation.T)
