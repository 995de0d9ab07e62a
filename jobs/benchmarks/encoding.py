"""Benchmark of adaptive encoding against fixed lengths, as a ratio within one run.

Shapes: B batch, S side in pixels.
"""

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
from jobs.benchmarks.options import EncodeBenchmarkOptions
from jobs.runtime.weights import load
from jobs.sources.decode import decode_plan
from jobs.sources.open import make_plan
from jobs.sources.records import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeTimes:
    """Seconds per batch, medians over the rounds.

    Attributes:
        images: Number of images in the batch.
        every: All iterations, each scored.
        adaptive: Stopping each image at its length.
        fixed: Seconds by fixed length.
        implied: The expected cost of the chosen lengths: the base and the first iteration, then each later iteration's
            cost at full batch times the share of images that are still active in it.
        ratio: adaptive / implied, the median of the rounds' ratios.
        mean_tokens: The mean chosen length.
    """

    images: int
    every: float
    adaptive: float
    fixed: dict[int, float]
    implied: float
    ratio: float
    mean_tokens: float


def time_encode(model: Alit, images: Tensor, criterion: Criterion, rounds: int) -> EncodeTimes:
    """Times the ways of encoding one batch, in alternation.

    Args:
        model: The tokenizer.
        images: uint8 [B, 3, S, S].
        criterion: A criterion with a score.
        rounds: Number of repetitions.
    """

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    iteration_ends: list[float] = []
    measure = criterion.measure
    assert measure is not None, "a criterion with a score"

    def timed_measure(candidate: Candidate) -> Tensor:
        score = measure(candidate)
        if score.is_cuda:
            torch.cuda.synchronize()
        iteration_ends.append(time.perf_counter())
        return score

    unreachable = math.inf if criterion.higher_is_better else -math.inf
    never_satisfied = dataclasses.replace(criterion, measure=timed_measure, threshold=unreachable)
    encoded = model.encode(images, criterion)  # also warms up
    iterations = encoded.num_tokens // model.config.latents_per_iteration
    active = [(iterations >= k + 1).float().mean().item() for k in range(model.config.iterations)]
    every, adaptive, implied = [], [], []
    fixed: dict[int, list[float]] = {length: [] for length in model.config.lengths}
    for _ in range(rounds):
        iteration_ends.clear()
        start = time.perf_counter()
        every.append(seconds(lambda: model.encode(images, never_satisfied)))
        iteration_seconds = np.diff([start, *iteration_ends])
        implied.append(float(np.dot(iteration_seconds, active)))
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


def benchmark_encode(source: str, options: EncodeBenchmarkOptions, console: Console) -> EncodeTimes:
    """Prints the images per second of encoding every length, adaptively, and at each fixed length.

    Args:
        source: INPUT of `alit benchmark encode`.
        options: Its options.
        console: Receives the results.

    Raises:
        AlitError: The input or the weights cannot be used, or the criterion is a fixed length.
    """
    weights = load(options.weights)
    criterion = parse(options.criterion or weights.model.config.criterion)
    if criterion.is_fixed:
        raise InputError(f"the benchmark compares an adaptive criterion with fixed lengths, got {criterion.spec!r}")
    pixels = _first_images(source, weights.model.config.image_size, options.batch_size, options.image_column)
    rounds = options.rounds
    times = time_encode(weights.model, to_tensor(pixels), criterion, rounds)
    console.print(f"{times.images} images in one batch, {torch.get_num_threads()} threads, {rounds} rounds, images/s:")
    console.print(f"  every length, scored        {times.images / times.every:8.1f}")
    console.print(
        f"  adaptive, {criterion.spec:<17} {times.images / times.adaptive:8.1f}   {times.mean_tokens:.1f} tokens each"
    )
    for length, seconds in times.fixed.items():
        console.print(f"  fixed:{length:<21} {times.images / seconds:8.1f}")
    console.print(f"adaptive costs {times.ratio:.3f} x what its lengths imply")
    return times


def _first_images(source: str, size: int, limit: int, image_column: str) -> np.ndarray:
    """Returns the first images of an input at the model's size, uint8 [B, S, S, 3]."""
    batches = []
    for decoded in decode_plan(make_plan(source, rows_per_file=256, image_column=image_column), size, limit):
        batches.append(decoded.pixels)
        if sum(map(len, batches)) >= limit:
            break
    return np.concatenate(batches)[:limit]
