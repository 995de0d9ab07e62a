"""Measurements as ratios within one run: what adaptive encoding costs, and what Ray costs."""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from alit.recipe import Stage, recipe_from
from alit.selection import Candidate, Criterion, parse
from alit.tokenizer import Alit
from jobs.inputs import InputError, Plan, make_plan
from jobs.options import TokenizeOptions
from jobs.runner import keep_freed_memory, local_cpus
from jobs.shards import Job, decoded_batches, decoded_plan, metadata_of
from jobs.sizing import Rates
from jobs.storage import place
from jobs.tokenize import Summary, tokenize
from jobs.train import Options, prepare
from jobs.weights import load
from jobs.workers import Placement, train_here, train_on_ray


def _images(source: str, size: int, most: int, image_column: str) -> np.ndarray:
    """The first images of an input at the model's size, uint8 [B, S, S, 3]."""
    found = []
    for decoded in decoded_plan(make_plan(source, rows_per_file=256, image_column=image_column), size, most):
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
    if parsed.measure is None:
        raise InputError(f"the benchmark compares an adaptive criterion with fixed ones, got {parsed.spec!r}")
    pixels = _images(source, loaded.model.config.image_size, batch_size, image_column)
    times = time_encode(loaded.model, torch.from_numpy(pixels).permute(0, 3, 1, 2), parsed, rounds)
    console.print(f"{times.images} images in one batch, {torch.get_num_threads()} threads, {rounds} rounds, images/s:")
    console.print(f"  every length, scored        {times.images / times.every:8.1f}")
    console.print(
        f"  adaptive, {parsed.spec:<17} {times.images / times.adaptive:8.1f}   {times.mean_tokens:.1f} tokens each"
    )
    for length, seconds in times.fixed.items():
        console.print(f"  fixed:{length:<21} {times.images / seconds:8.1f}")
    console.print(f"adaptive costs {times.ratio:.3f} x what its lengths imply")
    return times


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeRates:
    """Images per second of the bare loop and of the job, round by round."""

    bare: list[float]
    job: list[float]
    startup: list[float]
    batch_size: int

    @property
    def ratio(self) -> float:
        """The job's rate over the bare loop's, the median of the rounds' own ratios."""
        return statistics.median(job / bare for job, bare in zip(self.job, self.bare, strict=True))


def bare_loop(job: Job, plan: Plan, model: Alit, threads: int) -> float:
    """Images per second of one process without Ray or files: torch threads = cores, decoding ahead in threads."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    criterion = parse(job.metadata.criterion)
    images, start = 0, time.perf_counter()
    for shard in plan.shards:
        for decoded in decoded_batches(job, shard, threads):
            model.encode(torch.from_numpy(decoded.pixels).permute(0, 3, 1, 2), criterion)
            images += len(decoded.ids)
    return images / (time.perf_counter() - start)


def benchmark_tokenize(
    source: str,
    *,
    criterion: str | None,
    weights: str | None,
    rounds: int,
    image_column: str,
    rows_per_file: int,
    workers: int | None,
    rates_file: Path | None,
    console: Console,
) -> TokenizeRates:
    """Prints the job's images/s beside the bare loop's, in alternation over the same images on the same cores."""
    loaded = load(weights)
    plan = make_plan(source, rows_per_file=rows_per_file, image_column=image_column)
    cores, bare, ray, startup = local_cpus(), [], [], []
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            source=plan.source,
            output=place(folder),
            metadata=metadata_of(loaded, criterion or loaded.model.config.criterion),
        )
        rates = {}
        few = dataclasses.replace(plan, shards=plan.shards[:2])
        for batch_size in (16, 32, 64, 128):
            rates[batch_size] = bare_loop(dataclasses.replace(job, batch_size=batch_size), few, loaded.model, cores)
            console.print(f"bare loop, batches of {batch_size}: {rates[batch_size]:.1f} images/s")
        best = max(rates, key=lambda size: rates[size])
        for number in range(rounds):
            bare.append(bare_loop(dataclasses.replace(job, batch_size=best), plan, loaded.model, cores))
            summary = tokenize(
                source,
                str(Path(folder) / str(number)),
                TokenizeOptions(
                    criterion=job.metadata.criterion,
                    weights=weights,
                    batch_size=best,
                    image_column=image_column,
                    rows_per_file=rows_per_file,
                    workers=workers,
                ),
                console,
            )
            ray.append(summary.images_per_second)
            if rates_file is not None:
                files = (Path(folder) / str(number)).rglob("*.parquet")
                size = sum(path.stat().st_size for path in files)
                _measured(summary, size, workers or torch.cuda.device_count() or cores).save(rates_file)
            startup.append(summary.startup)
            console.print(f"bare loop {bare[-1]:.1f} images/s, job {ray[-1]:.1f} after {startup[-1]:.1f} s of start-up")
    result = TokenizeRates(bare=bare, job=ray, startup=startup, batch_size=best)
    console.print(f"{plan.images} images, {cores} cores: the job reaches {result.ratio:.1%} of the bare loop's rate")
    return result


def _measured(summary: Summary, size: int, workers: int) -> Rates:
    """A job's rates for `alit plan`; `size` is its dataset's, in bytes."""
    images = summary.totals.images
    return Rates(
        images_per_second=summary.images_per_second / workers,
        startup=summary.startup,
        tokens=summary.totals.tokens(summary.metadata) / max(1, images),
        output_bytes=size / max(1, images + summary.totals.rejects),
        worker=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        images=summary.encoded,
        criterion=summary.metadata.criterion,
        weights=summary.metadata.fingerprint,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRates:
    """Images per second of the bare loop and under Ray Train, round by round, and the latter's share of waiting."""

    bare: list[float]
    ray: list[float]
    waiting: list[float]

    @property
    def ratio(self) -> float:
        """The step's time under Ray over the bare loop's, the median of the rounds' own ratios."""
        return statistics.median(bare / ray for bare, ray in zip(self.bare, self.ray, strict=True))


def benchmark_train(
    source: str,
    stage: Stage,
    *,
    preset: str,
    init: str | None,
    batch_size: int | None,
    steps: int,
    threads: int | None,
    rounds: int,
    compile: bool,
    image_column: str,
    console: Console,
) -> TrainRates:
    """Prints the step time under Ray Train beside the bare loop's, in alternation over the same batches."""
    every = max(1, steps // 6)  # the first sixth, in which caches fill, is left out
    changes: dict[str, Any] = {"steps": steps, "log_every": every, "validate_every": steps, "checkpoint_every": steps}
    changes |= {"compile": compile} | ({"batch_size": batch_size} if batch_size else {})
    recipe = recipe_from(stage, preset, changes)
    options = Options(preset=preset, init=init, image_column=image_column, threads=threads)
    rates: dict[str, list[float]] = {"bare": [], "ray": []}
    waiting: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for kind in rates:
                run = f"{folder}/{kind}-{number}"
                start, lines = prepare(stage, source, run, recipe, options, Console(quiet=True))
                if not rates["bare"]:
                    console.print("\n".join(lines[:-1]), highlight=False, soft_wrap=True)
                rows: list[dict[str, Any]] = []

                def tell(event: dict[str, Any], rows: list[dict[str, Any]] = rows) -> None:
                    if "row" in event and event["row"]["step"] > every:
                        rows.append(event["row"])

                if kind == "bare":
                    train_here(start, tell=tell)
                else:
                    train_on_ray(start, Placement(), tell=tell)
                    waiting.append(statistics.mean(row["waiting"] for row in rows))
                rates[kind].append(statistics.harmonic_mean(row["images_per_second"] for row in rows))
                mfu = f", {statistics.mean(row['mfu'] for row in rows):.1%} MFU" if "mfu" in rows[0] else ""
                console.print(f"{kind}: {rates[kind][-1]:.1f} images/s{mfu}")
    result = TrainRates(bare=rates["bare"], ray=rates["ray"], waiting=waiting)
    console.print(
        f"{stage}, {steps} steps: a step under Ray Train takes {result.ratio:.3f} x the bare loop's time; "
        f"{statistics.mean(waiting):.1%} of it is waiting for data"
    )
    return result
