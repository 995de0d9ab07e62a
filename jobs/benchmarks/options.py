"""Options of `alit benchmark`, one class per sub-command, without torch or Ray, so that help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from jobs.tokenization.options import CRITERION_HELP


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkOptions:
    """Options of every benchmark.

    Attributes:
        rounds: Repetitions, in alternation.
        image_column: As for tokenize.
    """

    rounds: int = 3
    image_column: str = "image"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeBenchmarkOptions(BenchmarkOptions):
    """Options of `alit benchmark encode`.

    Attributes:
        weights: A weights folder; the packaged weights by default.
        batch_size: Images in the one batch that is measured.
    """

    criterion: Annotated[str | None, arg(help=CRITERION_HELP)] = None
    weights: str | None = None
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeBenchmarkOptions(BenchmarkOptions):
    """Options of `alit benchmark tokenize`.

    Attributes:
        weights: A weights folder; the packaged weights by default.
        rows_per_file: As for tokenize.
        workers: As for tokenize.
        rates: A file to write the measured rates to, for alit estimate.
    """

    criterion: Annotated[str | None, arg(help=CRITERION_HELP)] = None
    weights: str | None = None
    rows_per_file: int = 512
    workers: int | None = None
    rates: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBenchmarkOptions(BenchmarkOptions):
    """Options of `alit benchmark train`.

    Attributes:
        stage: The stage to train.
        preset: The recipe's defaults, and the model where no weights are given.
        weights: A weights folder to start from; by default the packaged weights for distill and finetune, and a new
            model for base.
        batch_size: Images per step; the recipe's by default.
        steps: Steps per round.
        threads: CPU threads; by default all of the machine's, which Ray's own processes then compete for.
        compile: Compile the network's blocks.
    """

    stage: Literal["base", "distill", "finetune"] = "base"
    preset: str = "nano"
    weights: str | None = None
    batch_size: int | None = None
    steps: int = 120
    threads: int | None = None
    compile: bool = False
