"""Results of encoding: of one image, of a batch, and of each iteration of a full rollout.

Shapes: B batch, G base tokens, K iterations, N latents, T tokens of the whole batch, C code width, D width,
O prediction width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from alit.encoding.criteria import Criterion
from alit.model.config import AlitConfig


@dataclass(eq=False, kw_only=True, slots=True)
class ImageResult:
    """The result for one image, filled in during its rollout.

    Attributes:
        criterion: Decides when the image has enough tokens.
        max_tokens: The longest code that the image may get, whatever the criterion; None for the model's longest.
        trace: The criterion's value at every length tried, shortest first.
        tokens: Ids [N] or codes [N, C] of the chosen length, on the CPU; None until the rollout is complete.
        satisfied: Whether the criterion was met.
    """

    criterion: Criterion
    max_tokens: int | None = None
    trace: list[float] = field(default_factory=list)
    tokens: Tensor | None = None
    satisfied: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A batch of images as tokens of mixed length, on the CPU.

    Attributes:
        tokens: The latent ids of all images concatenated, int64 [T]; for continuous latents their codes, [T, C].
        num_tokens: The number of tokens of each image, int64 [B].
        score: The criterion's value at the chosen length, float32 [B]; NaN for `fixed`.
        satisfied: Whether the criterion was met, bool [B].
        trace: The criterion's value at every length tried, shortest first, float32 [B, K]; NaN for the other lengths.
        tried: The number of lengths scored, int64 [B]; 0 for `fixed`.
    """

    tokens: Tensor
    num_tokens: Int[Tensor, "B"]
    score: Float[Tensor, "B"]
    satisfied: Tensor
    trace: Float[Tensor, "B K"]
    tried: Int[Tensor, "B"]

    def __len__(self) -> int:
        return len(self.num_tokens)

    def split(self) -> tuple[Tensor, ...]:
        """Returns the tokens of each image, as views."""
        return self.tokens.split(self.num_tokens.tolist())

    @classmethod
    def join(cls, results: Sequence[ImageResult], config: AlitConfig) -> Encoded:
        """Joins the complete results of a batch that a model of this config encoded."""
        empty = torch.zeros(0, dtype=torch.long) if config.codebook_size else torch.zeros(0, config.code_dim)
        rows = [result.tokens for result in results if result.tokens is not None]
        traces = [result.trace for result in results]
        padded = [trace + [math.nan] * (config.iterations - len(trace)) for trace in traces]
        return cls(
            tokens=torch.cat([empty, *rows]),
            num_tokens=torch.tensor([len(row) for row in rows], dtype=torch.long),
            score=torch.tensor([trace[-1] if trace else math.nan for trace in traces], dtype=torch.float32),
            satisfied=torch.tensor([result.satisfied for result in results], dtype=torch.bool),
            trace=torch.tensor(padded, dtype=torch.float32).reshape(-1, config.iterations),
            tried=torch.tensor([len(trace) for trace in traces], dtype=torch.long),
        )


class RolloutStep(NamedTuple):
    """The state of all images after one iteration of a full rollout.

    Attributes:
        latents_BND: The latents so far.
        codes_BNC: The input of the latent decoder: unit codebook rows, or continuous codes.
        ids_BN: The ids of the codes; None for continuous latents.
        unquantized_BNC: The encoder's codes before quantization.
        quantizer_loss: A scalar; 0 for continuous latents.
        predictions_BGO: The output of the latent decoder, where it was requested or halting needed it.
        attention_BNG: The share of attention that each latent pays to each base token, where it was requested.
    """

    latents_BND: Tensor
    codes_BNC: Tensor
    ids_BN: Tensor | None
    unquantized_BNC: Tensor
    quantizer_loss: Tensor
    predictions_BGO: Tensor | None
    attention_BNG: Tensor | None
