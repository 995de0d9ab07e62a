"""Token-selection criteria: when has an image got enough tokens?

A criterion is written `name:threshold` everywhere: command line, API, metadata. It scores each image at each length and
is satisfied at the first length whose score reaches the threshold. Nothing is computed that its measure does not ask
for: a `Candidate` makes predictions and pixels on first use.

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
    """The images still being encoded, at one length; the argument of every measure.

    Attributes:
        images: [B, 3, H, W] in [0, 1].
        base: their base tokens.
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
        """The latent decoder's output; runs the latent decoder."""
        return self._predict()

    @cached_property
    def latents(self) -> Float[Tensor, "B D h w"]:
        """The base latents that the predictions stand for."""
        return self._to_latents(self.predictions)

    @cached_property
    def reconstructions(self) -> Float[Tensor, "B 3 H W"]:
        """The images that the tokens decode to, unclamped; runs the pixel decoder too."""
        return self._to_pixels(self.latents)


Measure = Callable[[Candidate], Tensor]


def _wrong_codes(candidate: Candidate) -> Tensor:
    assert candidate.base.ids_BG is not None, "check() refuses the code criterion for a continuous base"
    return (candidate.predictions.argmax(-1) != candidate.base.ids_BG).float().mean(-1)


def _latent_rmse(candidate: Candidate) -> Tensor:
    return (candidate.latents - candidate.base.target_BDhw).square().mean(dim=(1, 2, 3)).sqrt()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    measure: Measure
    low: float
    high: float
    higher_is_better: bool = False


_KINDS = {
    "l1": _Kind(measure=lambda c: pixel.l1(c.images, c.reconstructions), low=0, high=1),
    "mse": _Kind(measure=lambda c: pixel.mse(c.images, c.reconstructions), low=0, high=1),
    "psnr": _Kind(measure=lambda c: pixel.psnr(c.images, c.reconstructions), low=0, high=100, higher_is_better=True),
    "ssim": _Kind(measure=lambda c: pixel.ssim(c.images, c.reconstructions), low=-1, high=1, higher_is_better=True),
    "code": _Kind(measure=_wrong_codes, low=0, high=1),
    "latent": _Kind(measure=_latent_rmse, low=0, high=math.inf),
}


def criterion_name(spec: str) -> str:
    """Returns the name in a stored `name:threshold`, without loading a user's function: `l1` for `l1:0.07`."""
    return spec.partition(":")[0]


HELP = (
    "fixed:N (always N tokens), l1:T, mse:T, code:T (share of base tokens predicted wrongly), latent:T (RMSE of the "
    "base latents), satisfied at or below T; psnr:T (dB), ssim:T, satisfied at or above T; or "
    "package.module:function@T for a function of yours that takes an alit.Candidate and returns one error "
    "per image"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Criterion:
    """One parsed criterion; make it with `parse`.

    Attributes:
        spec: how it is written.
        length: the token count of `fixed:N`, else None.
        threshold: where a score satisfies it (NaN for `fixed`).
        measure: scores a candidate, one number per image; None for `fixed`.
        higher_is_better: whether a score satisfies at or above the threshold instead of at or below it.
    """

    spec: str
    length: int | None = None
    threshold: float = math.nan
    measure: Measure | None = None
    higher_is_better: bool = False

    @property
    def name(self) -> str:
        """What stands before the colon: a built-in measure, `fixed`, or the module of a user's function."""
        return criterion_name(self.spec)

    @property
    def is_fixed(self) -> bool:
        """Whether every image gets the same number of tokens, unscored."""
        return self.measure is None

    def score(self, candidate: Candidate) -> Float[Tensor, "B"] | None:
        """One score per image, or None for `fixed`.

        Raises:
            CriterionError: a user's function returned something else than one number per image.
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
        """Which scores reach the threshold; NaN never does."""
        # compared in fp32, as scores are stored: a reader of the dataset must come to the same answer
        threshold = torch.tensor(self.threshold, dtype=torch.float32, device=score.device)
        return score >= threshold if self.higher_is_better else score <= threshold

    def check(self, config: AlitConfig) -> None:
        """Refuses a criterion that the model cannot follow.

        Raises:
            CriterionError: a fixed length that the model does not have, or `code` with a continuous base.
        """
        if self.length is not None and self.length not in config.lengths:
            choices = ", ".join(map(str, config.lengths))
            raise CriterionError(f"criterion {self.spec!r}: this model gives {choices} tokens, not {self.length}")
        if self.measure is _wrong_codes and not isinstance(config.base, VQGANConfig):
            raise CriterionError(
                f"criterion {self.spec!r} needs a discrete base; use latent:T with this continuous one"
            )


def parse(spec: str, *, functions: bool = True) -> Criterion:
    """Reads `name:threshold`.

    Args:
        spec: see `HELP`.
        functions: whether `package.module:function@T`, which imports code, is allowed.

    Raises:
        CriterionError: what does not parse, with what would.
    """
    name, separator, value = spec.strip().partition(":")
    if not separator:
        raise CriterionError(f"criterion {spec!r} has no ':'; write {HELP}")
    if name == "fixed":
        # the length first: int() refuses thousands of digits with an error of its own
        if not (value.isascii() and value.isdigit() and len(value) < 10 and int(value) > 0):
            raise CriterionError(f"criterion {spec!r}: fixed takes a token count such as fixed:64, got {value!r}")
        return Criterion(spec=f"fixed:{int(value)}", length=int(value))
    if name in _KINDS:
        kind = _KINDS[name]
        threshold = _threshold(spec, value, kind.low, kind.high)
        return Criterion(
            spec=f"{name}:{value.strip()}",
            threshold=threshold,
            measure=kind.measure,
            higher_is_better=kind.higher_is_better,
        )
    if "@" in value and functions:
        function, _, number = value.rpartition("@")
        return Criterion(
            spec=spec.strip(),
            threshold=_threshold(spec, number, -math.inf, math.inf),
            measure=_load(spec, name, function),
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


def _load(spec: str, module: str, function: str) -> Measure:
    try:
        measure: Measure = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError: a relative module name
        raise CriterionError(f"criterion {spec!r} cannot be loaded: {error}") from error
    if not callable(measure):
        raise CriterionError(f"criterion {spec!r}: {module}:{function} is not a function")

    def guarded(candidate: Candidate) -> Any:  # whatever it is: `Criterion.score` checks it
        try:
            return measure(candidate)
        except Exception as error:
            raise CriterionError(f"criterion {spec!r} failed: {type(error).__name__}: {error}") from error

    return guarded
