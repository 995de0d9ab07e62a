"""What encoding returns: the answer for one image, and a batch of them.

Shapes: B batch, K iterations, N latents, T tokens of the whole batch, C code width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from alit.encoding.criteria import Criterion
from alit.model.config import AlitConfig


@dataclass(eq=False, kw_only=True, slots=True)
class ImageResult:
    """What is known of one image so far.

    Attributes:
        criterion: says when it has enough tokens.
        most: the longest code that it may get, whatever the criterion says; None for the model's longest.
        trace: the criterion's value at every length tried, shortest first.
        tokens: ids [N] or codes [N, C] of the chosen length, on the CPU; None while it is not known.
        satisfied: whether the threshold was met.
    """

    criterion: Criterion
    most: int | None = None
    trace: list[float] = field(default_factory=list)
    tokens: Tensor | None = None
    satisfied: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A batch of images as tokens of mixed length. Everything lies on the CPU.

    Attributes:
        tokens: latent ids of all images one after another, int64 [T]; for continuous latents their codes, [T, C].
        num_tokens: int64 [B].
        score: the criterion's value at the chosen length, float32 [B]; NaN for `fixed`.
        satisfied: whether the threshold was met, bool [B].
        trace: the criterion's value at every length tried, shortest first, float32 [B, K]; NaN where none was tried.
        tried: how many lengths were scored, int64 [B]; 0 for `fixed`.
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
        """The tokens of each image, as views."""
        return self.tokens.split(self.num_tokens.tolist())

    @classmethod
    def of(cls, answers: Sequence[ImageResult], config: AlitConfig) -> Encoded:
        """The complete answers of a batch, as a model of that config gave them."""
        none = torch.zeros(0, dtype=torch.long) if config.codebook_size else torch.zeros(0, config.code_dim)
        rows = [answer.tokens for answer in answers if answer.tokens is not None]
        traces = [answer.trace for answer in answers]
        padded = [trace + [math.nan] * (config.iterations - len(trace)) for trace in traces]
        return cls(
            tokens=torch.cat([none, *rows]),
            num_tokens=torch.tensor([len(row) for row in rows], dtype=torch.long),
            score=torch.tensor([trace[-1] if trace else math.nan for trace in traces], dtype=torch.float32),
            satisfied=torch.tensor([answer.satisfied for answer in answers], dtype=torch.bool),
            trace=torch.tensor(padded, dtype=torch.float32).reshape(-1, config.iterations),
            tried=torch.tensor([len(trace) for trace in traces], dtype=torch.long),
        )
