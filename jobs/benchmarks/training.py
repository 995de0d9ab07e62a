"""Benchmark of training steps under Ray Train against a bare loop, as a ratio within one run."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from alit.training.recipes import Recipe, recipe_from
from alit.weights import default_weights
from jobs.benchmarks.options import TrainBenchmarkOptions
from jobs.training.events import Event, StepLog
from jobs.training.job import prepare
from jobs.training.options import TrainOptions
from jobs.training.ray_train import Placement, train_on_ray
from jobs.training.worker import TrainSpec, train_locally

Mode = Literal["bare", "ray"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRates:
    """Throughput of the bare loop and under Ray Train.

    Attributes:
        bare: Images per second of the bare loop, one value per round.
        ray: Images per second under Ray Train, one value per round.
        waiting: The share of the step time under Ray Train that is spent waiting for data, one value per round.
    """

    bare: list[float]
    ray: list[float]
    waiting: list[float]

    @property
    def ratio(self) -> float:
        """The step time under Ray over the bare loop's, the median of the rounds' ratios."""
        return statistics.median(bare / ray for bare, ray in zip(self.bare, self.ray, strict=True))


def benchmark_train(source: str, options: TrainBenchmarkOptions, console: Console) -> TrainRates:
    """Prints the step time under Ray Train and of the bare loop, in alternation on the same batches.

    Args:
        source: INPUT of `alit benchmark train`.
        options: Its options.
        console: Receives the results.

    Raises:
        AlitError: The input, the weights or an option cannot be used, or training fails.
    """
    stage, warmup = options.stage, _warmup_steps(options)
    recipe, train_options = _recipe(options), _train_options(options)
    rates: dict[Mode, list[float]] = {"bare": [], "ray": []}
    waiting: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for mode in rates:
                run = f"{folder}/{mode}-{number}"
                spec, lines = prepare(stage, source, run, recipe, train_options, Console(quiet=True))
                if not rates["bare"]:
                    console.print("\n".join(lines[:-1]), highlight=False, soft_wrap=True)
                logs = _train(mode, spec, warmup)
                if mode == "ray":
                    waiting.append(statistics.mean(log.waiting for log in logs))
                rates[mode].append(statistics.harmonic_mean(log.images_per_second for log in logs))
                utilizations = [log.mfu for log in logs if log.mfu is not None]
                mfu = f", {statistics.mean(utilizations):.1%} MFU" if utilizations else ""
                console.print(f"{mode}: {rates[mode][-1]:.1f} images/s{mfu}")
    result = TrainRates(bare=rates["bare"], ray=rates["ray"], waiting=waiting)
    console.print(
        f"{stage}, {options.steps} steps: a step under Ray Train takes {result.ratio:.3f} x the bare loop's time; "
        f"{statistics.mean(waiting):.1%} of it is waiting for data"
    )
    return result


def _warmup_steps(options: TrainBenchmarkOptions) -> int:
    """Returns the number of steps that are left out: the first sixth, in which caches fill."""
    return max(1, options.steps // 6)


def _recipe(options: TrainBenchmarkOptions) -> Recipe:
    changes: dict[str, Any] = {
        "steps": options.steps,
        "log_every": _warmup_steps(options),
        "validate_every": options.steps,
        "checkpoint_every": options.steps,
        "compile": options.compile,
    }
    if options.batch_size:
        changes["batch_size"] = options.batch_size
    return recipe_from(options.stage, options.preset, changes)


def _train_options(options: TrainBenchmarkOptions) -> TrainOptions:
    init = options.weights or (None if options.stage == "base" else str(default_weights()))
    return TrainOptions(preset=options.preset, init=init, image_column=options.image_column, threads=options.threads)


def _train(mode: Mode, spec: TrainSpec, warmup: int) -> list[StepLog]:
    """Trains one run and returns its logs after the warm-up."""
    logs: list[StepLog] = []

    def on_event(event: Event) -> None:
        if isinstance(event, StepLog) and event.step > warmup:
            logs.append(event)

    if mode == "bare":
        train_locally(spec, on_event=on_event)
    else:
        train_on_ray(spec, Placement(), on_event=on_event)
    return logs
