"""Cost of adaptive encoding beside fixed lengths, as a ratio within one run."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from alit.encoding.criteria import Candidate, Criterion, parse
from alit.images.tensors import to_tensor
from alit.tokenizer import Alit
from jobs.runtime.weights import load
from jobs.sources.decode import decode_plan
from jobs.sources.open import make_plan
from jobs.sources.records import InputError


def _images(source: str, size: int, most: int, image_column: str) -> np.ndarray:
    """The first images of an input at the model's size, uint8 [B, S, S, 3]."""
    found = []
    for decoded in decode_plan(make_plan(source, rows_per_file=256, image_column=image_column), size, most):
        found.append(decoded.pixels)
        if sum(map(len, found)) >= most:
            break
    return np.concatenate(found)[:most]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeTimes:
    """Seconds for one batch, medians over the rounds.

    Attributes:
        every: all iterations, each scored.
        adaptive: stopping each image at its length.
        fixed: seconds by length.
        implied: what the chosen lengths should cost: the base and the first iteration, then each later iteration's
            cost at full batch times the share of images still in it.
        ratio: adaptive / implied, the median of the rounds' own ratios.
        mean_tokens: the mean chosen length.
    """

    images: int
    every: float
    adaptive: float
    fixed: dict[int, float]
    implied: float
    ratio: float
    mean_tokens: float


def time_encode(model: Alit, images: Tensor, criterion: Criterion, rounds: int) -> EncodeTimes:
    """Times one batch in alternation."""

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    marks: list[float] = []
    measure = criterion.measure
    assert measure is not None, "a criterion with a score"

    def marked(candidate: Candidate) -> Tensor:
        score = measure(candidate)
        if score.is_cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return score

    never = math.inf if criterion.higher_is_better else -math.inf
    never_satisfied = dataclasses.replace(criterion, measure=marked, threshold=never)
    encoded = model.encode(images, criterion)  # also warms up
    rounds_used = encoded.num_tokens // model.config.latents_per_iteration
    active = [(rounds_used >= k + 1).float().mean().item() for k in range(model.config.iterations)]
    every, adaptive, implied = [], [], []
    fixed: dict[int, list[float]] = {length: [] for length in model.config.lengths}
    for _ in range(rounds):
        marks.clear()
        start = time.perf_counter()
        every.append(seconds(lambda: model.encode(images, never_satisfied)))
        steps = np.diff([start, *marks])
        implied.append(float(np.dot(steps, active)))
        adaptive.append(seconds(lambda: model.encode(images, criterion)))
        for length, times in fixed.items():
            times.append(seconds(lambda length=length: model.encode(images, f"fixed:{length}")))
    return EncodeTimes(
        images=len(images),
        every=statistics.median(every),
        adaptive=statistics.median(adaptive),
        fixed={length: statistics.median(times) for length, times in fixed.items()},
        implied=statistics.median(implied),
        ratio=statistics.median(a / b for a, b in zip(adaptive, implied, strict=True)),
        mean_tokens=encoded.num_tokens.double().mean().item(),
    )


def benchmark_encode(
    source: str,
    *,
    criterion: str | None,
    weights: str | None,
    batch_size: int,
    rounds: int,
    image_column: str,
    console: Console,
) -> EncodeTimes:
    """Prints images/s of encoding every length, adaptively and at each fixed length."""
    loaded = load(weights)
    parsed = parse(criterion or loaded.model.config.criterion)
    if parsed.is_fixed:
        raise InputError(f"the benchmark compares an adaptive criterion with fixed ones, got {parsed.spec!r}")
    pixels = _images(source, loaded.model.config.image_size, batch_size, image_column)
    times = time_encode(loaded.model, to_tensor(pixels), parsed, rounds)
    console.print(f"{times.images} images in one batch, {torch.get_num_threads()} threads, {rounds} rounds, images/s:")
    console.print(f"  every length, scored        {times.images / times.every:8.1f}")
    console.print(
        f"  adaptive, {parsed.spec:<17} {times.images / times.adaptive:8.1f}   {times.mean_tokens:.1f} tokens each"
    )
    for length, seconds in times.fixed.items():
        console.print(f"  fixed:{length:<21} {times.images / seconds:8.1f}")
    console.print(f"adaptive costs {times.ratio:.3f} x what its lengths imply")
    return times
