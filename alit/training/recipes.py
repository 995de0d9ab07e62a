"""Hyperparameters of each training stage: frozen dataclasses, with presets as functions.

A run's folder and its weights folder both store the resolved recipe.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from alit.errors import ConfigError
from alit.validation import require, require_range

PUBLISHED_WEIGHTS = (2.5, 2.0, 1.5, 1.25)
"""Loss weights of the first iterations in the published first stage; later iterations have a weight of 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Hyperparameters that all stages share.

    Attributes:
        steps: Total number of optimizer steps; the learning rate reaches 0 at the last one.
        batch_size: Images per step, over all workers.
        accumulate: Number of parts of a worker's share that are processed one after the other, to save memory.
        learning_rate: Peak learning rate, between the warmup and the cosine decay.
        warmup: Steps of linear warmup.
        weight_decay: Weight decay, on matrices only.
        clip: Largest gradient norm.
        ema: Decay of the averaged weights, which are the ones exported.
        bf16: Compute in bfloat16 where that is safe.
        compile: Compile the network's blocks; worthwhile on GPUs.
        recompute: Activation checkpointing: recompute the activations of transformer blocks in the backward pass.
        sharding: ddp: every worker holds the whole model; fsdp: parameters and optimizer state are sharded.
        seed: Seed of initial values, order and crops.
        log_every: Steps between log lines.
        validate_every: Steps between validations.
        checkpoint_every: Steps between checkpoints.
        keep: Number of checkpoints to keep, in addition to the best.
    """

    steps: int = 2000
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    bf16: bool = True
    compile: bool = False
    recompute: bool = False
    sharding: Literal["ddp", "fsdp"] = "ddp"
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    checkpoint_every: int = 250
    keep: int = 2

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "warmup", "log_every", "validate_every", "checkpoint_every")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _require_type(field.name, value, _annotation(type(self), field.name))
            if field.name in (*counts, "keep"):
                _require_positive(field.name, value)
            if isinstance(value, float):
                valid = math.isfinite(value) and value >= 0
                require(valid, f"{field.name} must be a number from 0, got {value}", ConfigError)
        require(self.learning_rate > 0, "learning_rate must be above 0, got 0.0", ConfigError)
        require(0 <= self.ema < 1, f"ema must lie from 0 to below 1, got {self.ema}", ConfigError)

    def rate(self, step: int) -> float:
        """Returns the ratio of the learning rate at a step to its peak: linear warmup, then cosine decay to 0."""
        warm = min(1.0, (step + 1) / self.warmup)
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdversarialRecipe(Recipe):
    """Hyperparameters that the stages with pixel losses share.

    Attributes:
        perceptual_weight: Weight of LPIPS, if its files are given.
        gan_weight: Weight of the adversarial loss; 0 for no discriminator. At 1, its gradient at the last layer is as
            large as that of the reconstruction loss.
        gan_from: First step of adversarial training.
        gan_ramp: Steps over which the adversarial weight rises from 0.
        gan_learning_rate: Peak learning rate of the discriminator.
        discriminator: shared: one discriminator, conditioned on the number of tokens; per-length: one for every number.
        discriminator_width: Channels of the discriminator's first layer.
        discriminator_layers: Number of the discriminator's downsampling layers.
    """

    perceptual_weight: float = 1.0
    gan_weight: float = 0.0
    gan_from: int = 0
    gan_ramp: int = 500
    gan_learning_rate: float = 1e-4
    discriminator: Literal["shared", "per-length"] = "shared"
    discriminator_width: int = 64
    discriminator_layers: int = 3

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        for name in ("gan_ramp", "discriminator_layers"):
            _require_positive(name, getattr(self, name))
        width = self.discriminator_width
        require(width >= 8 and width % 8 == 0, f"discriminator_width must be a multiple of 8, got {width}", ConfigError)


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseRecipe(AdversarialRecipe):
    """Hyperparameters of the first stage, which trains the base tokenizer.

    Attributes:
        quantize_from: Step from which a VQGAN's latents are quantized and the commitment loss applies.
        commitment: Weight of the commitment loss.
        kl_weight: Weight of the KL divergence of a KL base.
    """

    quantize_from: int = 250
    commitment: float = 0.1
    kl_weight: float = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillRecipe(Recipe):
    """Hyperparameters of latent distillation on a frozen base.

    Attributes:
        grad_iterations: Number of randomly drawn rollout iterations that each step supervises; all when None.
        sample_depth: Also draw the rollout's depth, uniformly from 1 to the maximum.
        quantize_from: Step from which latents are quantized.
        quantize_over: Steps of the transition from continuous to quantized latents.
        code_weight: Weight of the cross-entropy of the base's ids.
        latent_weight: Weight of the squared error of the predicted base latents, relative to their variance.
        pixel_weight: Weight of the L1 error of the decoded image, for one of the supervised iterations.
        pixel_from: Step from which the pixel loss applies.
        iteration_weights: Weight of each iteration's loss; 1 beyond the end of the list.
        local_start: For a base without distillation, start from initial values with which small models learn fast.
    """

    grad_iterations: int | None = None
    sample_depth: bool = False
    quantize_from: int = 250
    quantize_over: int = 100
    code_weight: float = 1.0
    latent_weight: float = 1.0
    pixel_weight: float = 0.0
    pixel_from: int = 0
    iteration_weights: tuple[float, ...] = PUBLISHED_WEIGHTS
    local_start: bool = True

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        for name in ("grad_iterations", "quantize_over"):
            _require_positive(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneRecipe(AdversarialRecipe):
    """Hyperparameters of finetuning the whole model on pixels, one length per step."""

    learning_rate: float = 1e-4


Stage = Literal["base", "distill", "finetune"]
RECIPES: dict[str, type[Recipe]] = {"base": BaseRecipe, "distill": DistillRecipe, "finetune": FinetuneRecipe}


def _nano(stage: Stage) -> Recipe:
    """Returns the recipe of the packaged model, which trains on one machine's CPUs in an hour or two."""
    if stage == "base":
        return BaseRecipe(steps=2400)
    if stage == "distill":
        return DistillRecipe(steps=3500, quantize_from=1200, quantize_over=175, pixel_weight=10.0, pixel_from=2300)
    return FinetuneRecipe(steps=6000, learning_rate=5e-4, validate_every=1000)


def _published(stage: Stage) -> Recipe:
    """Returns the recipe of the paper, for 200 epochs of ImageNet."""
    shared: dict[str, Any] = {
        "weight_decay": 0.05, "ema": 0.9999, "clip": 3.0, "compile": True, "log_every": 50, "validate_every": 5000,
        "checkpoint_every": 2500,
    }  # fmt: skip
    if stage == "base":
        return BaseRecipe(
            steps=500_000, batch_size=256, learning_rate=1e-4, warmup=5000, quantize_from=2000, gan_weight=0.8,
            gan_from=20_000, gan_ramp=5000, **shared,
        )  # fmt: skip
    if stage == "distill":
        return DistillRecipe(
            steps=1_000_000, batch_size=256, learning_rate=1.5e-4, warmup=100_000, quantize_from=0, quantize_over=1,
            local_start=False, **shared,
        )  # fmt: skip
    return FinetuneRecipe(
        steps=2_670_000, batch_size=96, learning_rate=3.75e-5, warmup=267_000, gan_weight=0.8, gan_from=267_000,
        gan_ramp=1_000_000, **shared,
    )  # fmt: skip


RECIPE_PRESETS: dict[str, Callable[[Stage], Recipe]] = {
    name: _nano if name == "nano" else _published for name in ("nano", "tiny", "small", "base", "semilarge")
}
"""The recipe of each stage, for every model preset of `alit.model.presets`."""


def recipe_from(stage: Stage, preset: str, changes: dict[str, Any] | None = None) -> Recipe:
    """Returns a preset's recipe with changed fields.

    Args:
        stage: The training stage.
        preset: The name of a model preset.
        changes: New values, by field; lists stand for tuples, and integers for floats.

    Raises:
        ConfigError: The preset, a field or a value is invalid; the message names it.
    """
    if preset not in RECIPE_PRESETS:
        raise ConfigError(f"the preset must be one of {', '.join(RECIPE_PRESETS)}, got {preset!r}")
    recipe = RECIPE_PRESETS[preset](stage)
    known = [field.name for field in dataclasses.fields(recipe)]
    for name in changes or {}:
        if name not in known:
            raise ConfigError(f"a recipe for {stage} has no field {name!r}; it has {', '.join(known)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in (changes or {}).items()}
    values = {k: float(v) if _wants_float(type(recipe), k) and type(v) is int else v for k, v in values.items()}
    return dataclasses.replace(recipe, **values)


def _require_positive(name: str, value: int | None) -> None:
    require_range(name, value, 1, error=ConfigError)


def _annotation(kind: type, name: str) -> Any:
    return typing.get_type_hints(kind)[name]


def _wants_float(kind: type, name: str) -> bool:
    return _annotation(kind, name) is float


def _require_type(name: str, value: object, wanted: Any) -> None:
    if typing.get_origin(wanted) is Literal:
        choices = typing.get_args(wanted)
        if value not in choices:
            raise ConfigError(f"{name} must be {' or '.join(map(str, choices))}, got {value!r}")
        return
    if typing.get_origin(wanted) is tuple:
        if not (isinstance(value, tuple) and all(isinstance(v, (int, float)) for v in value)):
            raise ConfigError(f"{name} must be a list of numbers, got {value!r}")
        return
    accepted = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if type(value) not in accepted:
        kinds = " or ".join("nothing" if kind is types.NoneType else kind.__name__ for kind in accepted)
        raise ConfigError(f"{name} must be {kinds}, got {value!r}")
