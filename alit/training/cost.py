"""Estimates of memory and computation from shapes alone, on the meta device."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from alit.model.config import AlitConfig
from alit.tokenizer import Alit
from alit.training.objectives import objective_for
from alit.training.recipes import FinetuneRecipe, Recipe

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12}
"""Dense bf16 (V100: fp16) floating-point operations per second, from the manufacturers' data sheets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The cost of one training stage.

    Attributes:
        trained: The number of trained parameters of the model.
        frozen: The number of its other parameters.
        discriminator: The number of parameters of the discriminator.
        state_bytes: The size of weights, gradients, both Adam moments and the average, in fp32.
        activation_bytes: The size of the activations kept per image for the backward pass, in fp32; bf16 needs about
            half, fused attention less.
        flops: Floating-point operations per image, forward and backward, mean over the lengths.
    """

    trained: int
    frozen: int
    discriminator: int
    state_bytes: int
    activation_bytes: int
    flops: float


def cost(config: AlitConfig, recipe: Recipe) -> Cost:
    """Returns the cost of a stage: exact for parameters and state, an upper bound for activations."""
    recipe = dataclasses.replace(recipe, compile=False)
    with torch.device("meta"):
        model = Alit(config)
    objective = objective_for(model, recipe)
    trained = {id(p) for _, p in objective.trainable(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    counts = {kind: sum(p.numel() for p in model.parameters() if (id(p) in trained) == kind) for kind in (True, False)}
    adversary = objective.adversary
    if adversary is not None:
        adversary.discriminator.to("meta")
    discriminator = sum(p.numel() for p in adversary.discriminator.parameters()) if adversary else 0
    images, generator = torch.zeros(2, 3, config.image_size, config.image_size, device="meta"), torch.Generator()
    flops, activation_bytes = 0, 0
    # finetuning trains one length per step in turn, and the cost grows about linearly with the length
    ends = (0, config.iterations - 1) if isinstance(recipe, FinetuneRecipe) else (0,)
    for k in ends:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        step = recipe.steps - recipe.steps % config.iterations + k  # all losses that start late are active
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                losses = objective.losses(model, images, step, copy.copy(generator))
                total = losses.total
            total.backward()
        activation_bytes = max(activation_bytes, sum(kept.values()))
        flops += counter.get_total_flops()
    return Cost(
        trained=counts[True],
        frozen=counts[False],
        discriminator=discriminator,
        state_bytes=4 * (5 * counts[True] + counts[False] + 4 * discriminator),
        activation_bytes=activation_bytes // len(images),
        flops=flops / len(ends) / len(images),
    )


def inference_bytes(config: AlitConfig) -> int:
    """Estimates the memory of encoding per image in fp32: four times the largest input and output of one layer."""
    with torch.device("meta"):
        model = Alit(config)
    largest = 0

    def measure(layer: torch.nn.Module, inputs: tuple[object, ...], outputs: object) -> None:
        nonlocal largest
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        tensors = [tensor for tensor in (*inputs, *outputs) if isinstance(tensor, Tensor)]
        largest = max(largest, sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    for layer in model.modules():
        if not any(True for _ in layer.children()):
            layer.register_forward_hook(measure)
    with torch.no_grad():
        images = torch.zeros(1, 3, config.image_size, config.image_size, device="meta")
        *_, last = model.rollout(images)
        model.reconstruct(last.codes_BNC)
    return 4 * largest


def peak_flops(device: torch.device) -> float | None:
    """Returns the peak bf16 operations per second of a device; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)
