"""Initial values with which a small model learns to route information within minutes instead of hours.

Published initial values give every token a random position embedding, and the model must first learn which latent
should attend where. Here position embeddings are Fourier features of the location (so that near locations have similar
embeddings), the latents of each iteration are distributed over the image, and every attention block initially attends
to similar tokens (after Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers"). The architecture
is unchanged, and all values remain trainable.

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
"""Distance in base tokens over which the similarity of two locations decays."""
FOCUS = 1.3
"""Scale of queries and keys, which sets how sharply attention initially selects similar tokens."""
COPY = 0.5
"""Initial scale of an attention block's output."""


def _locations(config: AlitConfig) -> tuple[Tensor, Tensor]:
    """Returns the locations of base tokens [G, 2] and of the latents of each iteration [K, n, 2], in base tokens."""
    line = torch.arange(config.grid) + 0.5
    tokens = torch.cartesian_prod(line, line)
    new = config.latents_per_iteration
    rows = max(r for r in range(1, math.isqrt(new) + 1) if new % r == 0)  # the squarest arrangement of n latents
    height, width = config.grid / rows, config.grid / (new // rows)
    centers = torch.cartesian_prod((torch.arange(rows) + 0.5) * height, (torch.arange(new // rows) + 0.5) * width)
    # each iteration shifts its latents within their patches, to another cell of a square grid
    k = torch.arange(config.iterations)
    side = math.ceil(math.sqrt(config.iterations))
    shifts = torch.stack([(k // side + 0.5) / side - 0.5, (k % side + 0.5) / side - 0.5], dim=-1)
    return tokens, centers + 0.8 * shifts[:, None] * torch.tensor([height, width])


@torch.no_grad()
def initialize_locally(model: Alit, generator: torch.Generator) -> None:
    """Overwrites the initial values of a model's encoder and decoder, in place, with draws from the generator."""
    config, width = model.config, model.config.width
    frequencies = torch.randn(2, width // 2, generator=generator) / REACH

    def features(locations: Tensor) -> Tensor:
        angles = locations @ frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1) * (2 / width) ** 0.5

    tokens, latents = _locations(config)
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
        _attend_to_similar(block.attention, width, generator)


def _attend_to_similar(attention: Attention, width: int, generator: torch.Generator) -> None:
    """Sets equal query and key projections, and an output projection that inverts the value projection."""
    query, key, value = attention.qkv.weight.view(3, width, width)
    per_head = width // attention.heads
    for head in range(attention.heads):
        basis = torch.linalg.qr(torch.randn(width, per_head, generator=generator)).Q.T * FOCUS
        rows = slice(head * per_head, (head + 1) * per_head)
        query[rows], key[rows] = basis, basis
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    value.copy_(rotation)
    attention.out.weight.copy_(COPY * rotation.T)
