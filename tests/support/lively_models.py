"""Small models whose images get different scores at every length, in float64, and criteria between these scores.

Shapes: B batch, K iterations.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from itertools import pairwise

import torch
from small_models import TINY
from torch import Tensor, nn

from alit.encoding.results import Encoded
from alit.model.config import AlitConfig, KLConfig
from alit.model.vqgan import VQGAN
from alit.tokenizer import Alit

SHALLOW = dataclasses.replace(TINY, depth=1)
CONTINUOUS = dataclasses.replace(SHALLOW, codebook_size=None)
DETERMINISTIC = dataclasses.replace(SHALLOW, halting="deterministic", halting_threshold=0.04)
SAMPLED = dataclasses.replace(SHALLOW, halting="sampled", halting_threshold=0.0)
KL = dataclasses.replace(SHALLOW, base=KLConfig(channels=(32, 32), blocks=1, latent_dim=4))
CONFIGS = {"quantized": SHALLOW, "continuous": CONTINUOUS, "deterministic": DETERMINISTIC, "sampled": SAMPLED}
# each with a threshold that no image meets
STRICTEST = {"l1": "l1:0", "mse": "mse:0", "psnr": "psnr:100", "ssim": "ssim:1", "code": "code:0", "latent": "latent:0"}
PIXELS = ("l1", "mse", "psnr", "ssim")
APART = 1e-4
"""The distance of every threshold from every score, so that rounding satisfies no criterion."""


@cache
def images_u8() -> Tensor:
    """Returns seven smooth images, uint8 [7, 3, 16, 16]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(7, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(0, 1)
    return (255 * smooth).round().to(torch.uint8)


def images() -> Tensor:
    """Returns the same images in float64, from 0 to 1."""
    return images_u8().double() / 255


def batches(*sizes: int) -> list[Tensor]:
    """Returns the seven images over and over, in batches of these sizes."""
    return list((images()[torch.arange(sum(sizes)) % 7]).split(sizes))


@torch.no_grad()
def lively(config: AlitConfig) -> Alit:
    """Returns a model whose random weights are larger than usual, so that images and lengths differ in their scores."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Alit(config).double().eval()
        for part in [*model.encoder.modules(), *model.decoder.modules()]:
            if isinstance(part, nn.Linear):
                part.weight.mul_(8)
        model.decoder.head[2].weight.mul_(20)
        model.decoder.code_positions.mul_(40)
        model.encoder.iteration_embedding.mul_(6)
        if isinstance(model.base, VQGAN):
            model.base.decoder.conv_out.bias.fill_(0.5)
            latents = model.base.encode(images()).latents_BDhw.permute(0, 2, 3, 1).flatten(0, 2)
            model.base.codebook.weight.copy_(latents[torch.randperm(len(latents))[:32]])
    return model


@cache
def model_of(name: str) -> Alit:
    """Returns a model by its name in `CONFIGS`, or `kl`."""
    return lively(KL if name == "kl" else CONFIGS[name])


@cache
def thresholds(model_name: str, name: str) -> str:
    """Returns a criterion that gives as many different lengths as one can, with a threshold far from every score."""
    trace_BK = model_of(model_name).encode(images(), STRICTEST[name]).trace.double()
    scores = trace_BK.unique()  # sorted
    candidates = [(a + b).item() / 2 for a, b in pairwise(scores) if b - a > 2.1 * APART]

    def variety(threshold: float) -> int:
        good_BK = trace_BK >= threshold if name in ("psnr", "ssim") else trace_BK <= threshold
        first = [row.index(True) if True in row else None for row in good_BK.tolist()]
        return len(set(first))

    return f"{name}:{max(candidates, key=variety):.7f}"


def same(one: Encoded, other: Encoded) -> None:
    """Asserts that two results are bitwise equal."""
    for field in ("num_tokens", "satisfied", "tried", "score", "trace", "tokens"):
        torch.testing.assert_close(
            getattr(one, field), getattr(other, field), rtol=0, atol=0, equal_nan=True, msg=field
        )


def close(one: Encoded, other: Encoded) -> None:
    """Asserts that two results are equal within the rounding of float64, and their scores within that of float32."""
    for field in ("num_tokens", "satisfied", "tried"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field
    torch.testing.assert_close(one.tokens, other.tokens, rtol=0, atol=1e-9)
    for field in ("score", "trace"):
        torch.testing.assert_close(
            getattr(one, field), getattr(other, field), rtol=3e-7, atol=1e-9, equal_nan=True, msg=field
        )


@dataclasses.dataclass
class Work:
    """Rows that each part was called with, one entry per call."""

    encoder: list[int]
    latent_decoder: list[int]
    pixel_decoder: list[int]


def still_active(encoded: Encoded) -> list[int]:
    """Returns how many images each iteration had to run on: those that need at least its length."""
    return [count for n in TINY.lengths if (count := int((encoded.num_tokens >= n).sum()))]
