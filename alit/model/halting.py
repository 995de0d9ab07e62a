"""Dynamic halting: base tokens that are predicted well enough are masked in later iterations.

Shapes: B batch, G base tokens, K iterations, O prediction width.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alit.model.config import AlitConfig


def fixed_noise(config: AlitConfig) -> Tensor:
    """Returns the noise of sampled halting at inference, drawn from the config's seed on the CPU.

    It depends on iteration and position alone, so that an image's tokens do not depend on its batch.

    Returns:
        Uniform in [0, 1), [K, G]; empty unless halting is sampled.
    """
    generator = torch.Generator("cpu").manual_seed(config.halting_seed)
    shape = (config.iterations, config.grid**2) if config.halting == "sampled" else (0,)
    return torch.rand(*shape, generator=generator, device="cpu")


def halting_mask(
    predictions_BGO: Float[Tensor, "B G O"],
    ids_BG: Int[Tensor, "B G"],
    noise: Float[Tensor, "K *B G"] | Float[Tensor, "0"],
    iteration: int,
    config: AlitConfig,
) -> Bool[Tensor, "B G"]:
    """Returns which base tokens are masked from the next iteration on.

    A base token halts where the decoder gives its true code a probability of at least the config's threshold; with
    sampled halting, then only with that probability.

    Args:
        predictions_BGO: Logits over the base codebook. They receive no gradients.
        ids_BG: The base codes of the images.
        noise: Uniform in [0, 1): one value per position for all images [K, G], or one per image [K, B, G]. Read only
            where halting is sampled.
        iteration: The iteration that made the predictions, from 0.
        config: Holds mode and threshold.
    """
    probability_BG = predictions_BGO.detach().softmax(-1).gather(-1, ids_BG.unsqueeze(-1)).squeeze(-1)
    halted_BG = probability_BG >= config.halting_threshold
    if config.halting == "sampled":
        halted_BG &= noise[iteration] < probability_BG
    return halted_BG
