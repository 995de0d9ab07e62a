"""The command `alit benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from jobs.tokenization.options import CRITERION_HELP


def benchmark(
    what: Positional[Literal["encode", "tokenize", "train"]],
    source: Positional[Annotated[str, arg(metavar="INPUT")]],
    /,
    *,
    criterion: Annotated[str | None, arg(help=CRITERION_HELP)] = None,
    weights: str | None = None,
    batch_size: int | None = None,
    rounds: int = 3,
    image_column: str = "image",
    rows_per_file: int = 512,
    workers: int | None = None,
    rates: Path | None = None,
    stage: Literal["base", "distill", "finetune"] = "base",
    preset: str = "nano",
    steps: int = 120,
    threads: int | None = None,
    compile: bool = False,
) -> None:
    """Measure ratios within one run: adaptive against fixed encoding, or a Ray job against a bare loop.

    Args:
        what: encode: one batch, every way of encoding it. tokenize: the whole input, with and without Ray. train: some
            steps, with and without Ray Train.
        source: Images, as for tokenize.
        weights: A weights folder; the packaged one when not given. For train, where distill and finetune start.
        batch_size: Images of the one batch that encode measures, 64 when not given; of train's steps.
        rounds: Repetitions, in alternation.
        image_column: As for tokenize.
        rows_per_file: As for tokenize.
        workers: As for tokenize.
        rates: Where tokenize's rates are written, for alit plan.
        stage: What train trains.
        preset: Its model, where there are no weights to start from, and its recipe.
        steps: Its steps per round.
        threads: Its CPU threads, all of the machine's when not given: then Ray's own processes take theirs from them.
        compile: Whether it compiles the network's blocks.
    """
    from rich.console import Console

    from alit.weights import default_weights
    from jobs.benchmarks.encoding import benchmark_encode
    from jobs.benchmarks.tokenization import benchmark_tokenize
    from jobs.benchmarks.training import benchmark_train

    console = Console()
    if what == "encode":
        benchmark_encode(
            source,
            criterion=criterion,
            weights=weights,
            batch_size=64 if batch_size is None else batch_size,
            rounds=rounds,
            image_column=image_column,
            console=console,
        )
    elif what == "train":
        benchmark_train(
            source,
            stage,
            preset=preset,
            init=weights or (None if stage == "base" else str(default_weights())),
            batch_size=batch_size,
            steps=steps,
            threads=threads,
            rounds=rounds,
            compile=compile,
            image_column=image_column,
            console=console,
        )
    else:
        benchmark_tokenize(
            source,
            criterion=criterion,
            weights=weights,
            rounds=rounds,
            image_column=image_column,
            rows_per_file=rows_per_file,
            workers=workers,
            rates_file=rates,
            console=console,
        )
