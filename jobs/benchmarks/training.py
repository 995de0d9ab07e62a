"""Step time under Ray Train beside a bare loop, as a ratio within one run."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from alit.training.recipes import Stage, recipe_from
from jobs.training.job import prepare
from jobs.training.options import Options
from jobs.training.ray_train import Placement, train_on_ray
from jobs.training.worker import train_here


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
