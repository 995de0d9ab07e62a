"""How each stage is trained: frozen dataclasses, presets as functions.

A run's folder and its weights folder both keep the resolved recipe.
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

PUBLISHED_WEIGHTS = (2.5, 2.0, 1.5, 1.25)
"""Cross-entropy weights of the first iterations in the published first stage; 1 from there on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What all stages have in common.

    Attributes:
        steps: optimizer steps in all; the learning rate ends at 0 there.
        batch_size: images per step, over all workers.
        accumulate: parts that a worker cuts its share into, one after the other, to save memory.
        learning_rate: its peak, after `warmup` steps and before the cosine.
        warmup: steps of linear warmup.
        weight_decay: on matrices only.
        clip: largest gradient norm.
        ema: decay of the averaged weights, which are the ones that are kept.
        bf16: compute in bfloat16 where that is safe.
        compile: compile the network's blocks; pays on GPUs.
        recompute: keep no activations inside transformer blocks, recompute them on the way back.
        sharding: ddp: every worker has the whole model; fsdp: parameters and optimizer state are spread over workers.
        seed: of initial values, order and crops.
        log_every: steps between lines of progress.
        validate_every: steps between validations.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints to keep, beside the best.
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
            if field.name in (*counts, "keep") and value < 1:
                raise ConfigError(f"{field.name} must be at least 1, got {value}")
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{field.name} must be a number from 0, got {value}")
        if not self.learning_rate:
            raise ConfigError("learning_rate must be above 0, got 0.0")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must lie from 0 to below 1, got {self.ema}")

    def rate(self, step: int) -> float:
        """The learning rate's share of its peak at a step: linear warmup, then a cosine to 0."""
        warm = min(1.0, (step + 1) / self.warmup)
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdversarialRecipe(Recipe):
    """What the stages that look at pixels have in common.

    Attributes:
        perceptual_weight: of LPIPS, where its files are given.
        gan_weight: of the discriminator's pull on the last layer, relative to the reconstruction's; 0 for none.
        gan_from: the step from which generator and discriminator play.
        gan_ramp: steps over which the weight grows.
        gan_learning_rate: the discriminator's peak.
        discriminator: shared: one, told how many tokens a picture has; per-length: one for every count.
        discriminator_width, discriminator_layers: its size.
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
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.discriminator_width < 8 or self.discriminator_width % 8:
            raise ConfigError(f"discriminator_width must be a multiple of 8, got {self.discriminator_width}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseRecipe(AdversarialRecipe):
    """The base tokenizer from pixels.

    Attributes:
        quantize_from: the step from which a VQGAN's latents are quantized, and held to their codes.
        commitment: weight of the latents' distance to their codes.
        kl_weight: of a KL base's divergence.
    """

    quantize_from: int = 250
    commitment: float = 0.1
    kl_weight: float = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillRecipe(Recipe):
    """Latent distillation on a frozen base.

    Attributes:
        grad_iterations: how many of the rollout's iterations are supervised each step, drawn at random; all when None.
        sample_depth: draw the rollout's depth too, evenly from 1 to the deepest.
        quantize_from: the step from which latents are quantized.
        quantize_over: steps over which they go from continuous to quantized.
        code_weight: of the cross-entropy of the base's ids.
        latent_weight: of the squared error of the predicted base latents, relative to their variance.
        pixel_weight: of the L1 error of the decoded image, for one of the supervised iterations.
        pixel_from: the step from which pixels count.
        iteration_weights: of each iteration's loss; 1 where the list ends.
        local_start: begin with the initial values from which small models learn fast, on a base without distillation.
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
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneRecipe(AdversarialRecipe):
    """Everything trained on the pixels, one length per step."""

    learning_rate: float = 1e-4


Stage = Literal["base", "distill", "finetune"]
RECIPES: dict[str, type[Recipe]] = {"base": BaseRecipe, "distill": DistillRecipe, "finetune": FinetuneRecipe}


def _nano(stage: Stage) -> Recipe:
    """For one machine's CPUs, in an hour or two."""
    if stage == "base":
        return BaseRecipe(steps=2400)
    if stage == "distill":
        return DistillRecipe(steps=3500, quantize_from=1200, quantize_over=175, pixel_weight=10.0, pixel_from=2300)
    return FinetuneRecipe(steps=6000, learning_rate=5e-4, validate_every=1000)


def _published(stage: Stage) -> Recipe:
    """The paper's, for 200 epochs of ImageNet."""
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
"""The recipe of each stage for every model preset of `alit.config`."""


def recipe_from(stage: Stage, preset: str, changes: dict[str, Any] | None = None) -> Recipe:
    """A preset's recipe with some fields changed.

    Raises:
        ConfigError: an unknown preset, or an unknown field or value, named.
    """
    if preset not in RECIPE_PRESETS:
        raise ConfigError(f"the preset must be one of {', '.join(RECIPE_PRESETS)}, got {preset!r}")
    given = RECIPE_PRESETS[preset](stage)
    known = [field.name for field in dataclasses.fields(given)]
    for name in changes or {}:
        if name not in known:
            raise ConfigError(f"a recipe for {stage} has no field {name!r}; it has {', '.join(known)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in (changes or {}).items()}
    values = {k: float(v) if _wants_float(type(given), k) and type(v) is int else v for k, v in values.items()}
    return dataclasses.replace(given, **values)


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
