"""Token-selection criteria, which decide when an image has enough tokens.

A criterion is written `name:threshold` everywhere: command line, API, metadata. It scores each image at each length and
is satisfied at the first length whose score reaches the threshold. Only what its measure uses is computed: a
`Candidate` computes predictions and pixels on first use.

Shapes: B batch, G base tokens, O prediction width, D base latent width, h w base grid.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alit.errors import CriterionError
from alit.metrics import pixel
from alit.model.base import BaseTokens
from alit.model.config import AlitConfig, VQGANConfig


class Candidate:
    """Images at one length of their rollout, the argument of every measure.

    Args:
        images: [B, 3, H, W] in [0, 1].
        base: The images' base tokens.
        predict: Runs the latent decoder.
        to_latents: Converts predictions to base latents.
        to_pixels: Decodes base latents to images.
    """

    def __init__(
        self,
        images: Tensor,
        base: BaseTokens,
        *,
        predict: Callable[[], Tensor],
        to_latents: Callable[[Tensor], Tensor],
        to_pixels: Callable[[Tensor], Tensor],
    ) -> None:
        self.images = images
        self.base = base
        self._predict = predict
        self._to_latents = to_latents
        self._to_pixels = to_pixels

    @cached_property
    def predictions(self) -> Float[Tensor, "B G O"]:
        """The output of the latent decoder, which runs on first use."""
        return self._predict()

    @cached_property
    def latents(self) -> Float[Tensor, "B D h w"]:
        """The predicted base latents."""
        return self._to_latents(self.predictions)

    @cached_property
    def reconstructions(self) -> Float[Tensor, "B 3 H W"]:
        """The decoded images, unclamped; the pixel decoder runs on first use."""
        return self._to_pixels(self.latents)


Measure = Callable[[Candidate], Tensor]


def _wrong_codes(candidate: Candidate) -> Tensor:
    assert candidate.base.ids_BG is not None, "check() refuses the code criterion for a continuous base"
    return (candidate.predictions.argmax(-1) != candidate.base.ids_BG).float().mean(-1)


def _latent_rmse(candidate: Candidate) -> Tensor:
    return (candidate.latents - candidate.base.target_BDhw).square().mean(dim=(1, 2, 3)).sqrt()


@dataclass(frozen=True, kw_only=True, slots=True)
class _BuiltinMeasure:
    measure: Measure
    low: float
    high: float
    higher_is_better: bool = False


_BUILTIN_MEASURES = {
    "l1": _BuiltinMeasure(measure=lambda c: pixel.l1(c.images, c.reconstructions), low=0, high=1),
    "mse": _BuiltinMeasure(measure=lambda c: pixel.mse(c.images, c.reconstructions), low=0, high=1),
    "psnr": _BuiltinMeasure(
        measure=lambda c: pixel.psnr(c.images, c.reconstructions), low=0, high=100, higher_is_better=True
    ),
    "ssim": _BuiltinMeasure(
        measure=lambda c: pixel.ssim(c.images, c.reconstructions), low=-1, high=1, higher_is_better=True
    ),
    "code": _BuiltinMeasure(measure=_wrong_codes, low=0, high=1),
    "latent": _BuiltinMeasure(measure=_latent_rmse, low=0, high=math.inf),
}


CRITERIA = ("fixed", *_BUILTIN_MEASURES)
"""The names of the built-in criteria."""


def criterion_name(spec: str) -> str:
    """Returns the name in a stored `name:threshold`, without loading a user's function: `l1` for `l1:0.07`."""
    return spec.partition(":")[0]


HELP = (
    "fixed:N (always N tokens), l1:T, mse:T, code:T (share of base tokens predicted wrongly), latent:T (RMSE of the "
    "base latents), satisfied at or below T; psnr:T (dB), ssim:T, satisfied at or above T; or "
    "package.module:function@T for a function of your own that takes an alit.Candidate and returns one error "
    "per image"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Criterion:
    """A parsed criterion, created by `parse`.

    Attributes:
        spec: The criterion as text.
        length: The number of tokens of `fixed:N`, else None.
        threshold: The score that satisfies the criterion; NaN for `fixed`.
        measure: Returns one score per image of a candidate; None for `fixed`.
        higher_is_better: Scores satisfy the criterion at or above the threshold, instead of at or below it.
    """

    spec: str
    length: int | None = None
    threshold: float = math.nan
    measure: Measure | None = None
    higher_is_better: bool = False

    @property
    def name(self) -> str:
        """The part before the colon: a built-in measure, `fixed`, or the module of a user's function."""
        return criterion_name(self.spec)

    @property
    def is_fixed(self) -> bool:
        """Whether every image gets the same number of tokens, without scores."""
        return self.measure is None

    def score(self, candidate: Candidate) -> Float[Tensor, "B"] | None:
        """Returns one score per image, or None for `fixed`.

        Raises:
            CriterionError: A user's function returned something other than one number per image.
        """
        if self.measure is None:
            return None
        score = self.measure(candidate)
        if not isinstance(score, Tensor) or score.shape != candidate.images.shape[:1]:
            got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise CriterionError(
                f"criterion {self.spec!r} must return one number per image, a tensor of shape "
                f"({len(candidate.images)},), got {got}"
            )
        return score.float()

    def satisfied(self, score: Float[Tensor, "B"]) -> Bool[Tensor, "B"]:
        """Returns which scores reach the threshold; NaN never does."""
        # compared in fp32, in which scores are stored, so that readers of a dataset get the same result
        threshold = torch.tensor(self.threshold, dtype=torch.float32, device=score.device)
        return score >= threshold if self.higher_is_better else score <= threshold

    def check(self, config: AlitConfig) -> None:
        """Checks that a model of this config can follow the criterion.

        Raises:
            CriterionError: The model does not have the fixed length, or `code` is used with a continuous base.
        """
        if self.length is not None and self.length not in config.lengths:
            choices = ", ".join(map(str, config.lengths))
            raise CriterionError(f"criterion {self.spec!r}: this model gives {choices} tokens, not {self.length}")
        if self.measure is _wrong_codes and not isinstance(config.base, VQGANConfig):
            raise CriterionError(
                f"criterion {self.spec!r} needs a discrete base; use latent:T with this continuous one"
            )


def parse(spec: str, *, functions: bool = True) -> Criterion:
    """Parses `name:threshold`.

    Args:
        spec: The criterion as text, see `HELP`.
        functions: Allow `package.module:function@T`, which imports code.

    Raises:
        CriterionError: The text does not parse; the message shows what would.
    """
    name, separator, value = spec.strip().partition(":")
    if not separator:
        raise CriterionError(f"criterion {spec!r} has no ':'; write {HELP}")
    if name == "fixed":
        # the number of digits is checked first, as int() raises an error of its own for thousands of them
        if not (value.isascii() and value.isdigit() and len(value) < 10 and int(value) > 0):
            raise CriterionError(f"criterion {spec!r}: fixed takes a token count such as fixed:64, got {value!r}")
        return Criterion(spec=f"fixed:{int(value)}", length=int(value))
    if name in _BUILTIN_MEASURES:
        builtin = _BUILTIN_MEASURES[name]
        threshold = _threshold(spec, value, builtin.low, builtin.high)
        return Criterion(
            spec=f"{name}:{value.strip()}",
            threshold=threshold,
            measure=builtin.measure,
            higher_is_better=builtin.higher_is_better,
        )
    if "@" in value and functions:
        function, _, number = value.rpartition("@")
        return Criterion(
            spec=spec.strip(),
            threshold=_threshold(spec, number, -math.inf, math.inf),
            measure=_load_function(spec, name, function),
        )
    raise CriterionError(f"criterion {spec!r} is not known; write {HELP}")


def _threshold(spec: str, value: str, low: float, high: float) -> float:
    try:
        number = float(value)
    except ValueError:
        raise CriterionError(f"criterion {spec!r}: the threshold must be a number, got {value!r}") from None
    if not math.isfinite(number) or not low <= number <= high:
        raise CriterionError(f"criterion {spec!r}: the threshold must lie from {low:g} to {high:g}, got {value}")
    return number


def _load_function(spec: str, module: str, function: str) -> Measure:
    try:
        measure: Measure = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError: a relative module name
        raise CriterionError(f"criterion {spec!r} cannot be loaded: {error}") from error
    if not callable(measure):
        raise CriterionError(f"criterion {spec!r}: {module}:{function} is not a function")

    def guarded(candidate: Candidate) -> Any:  # `Criterion.score` checks the type
        try:
            return measure(candidate)
        except Exception as error:
            raise CriterionError(f"criterion {spec!r} failed: {type(error).__name__}: {error}") from error

    return guarded
