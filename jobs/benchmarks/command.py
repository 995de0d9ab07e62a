"""The command `alit benchmark` and its sub-commands."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg, subcommand

from jobs.benchmarks.options import EncodeBenchmarkOptions, TokenizeBenchmarkOptions, TrainBenchmarkOptions

ENCODE_DEFAULTS = EncodeBenchmarkOptions()
TOKENIZE_DEFAULTS = TokenizeBenchmarkOptions()
TRAIN_DEFAULTS = TrainBenchmarkOptions()

Source = Positional[Annotated[str, arg(metavar="INPUT", help="Images, as for tokenize.")]]


def encode(source: Source, /, *, options: Annotated[EncodeBenchmarkOptions, arg(name="")] = ENCODE_DEFAULTS) -> None:
    """Measure adaptive encoding of one batch against every fixed length.

    Example: alit benchmark encode photos/
    """
    from rich.console import Console

    from jobs.benchmarks.encoding import benchmark_encode

    benchmark_encode(source, options, Console())


def tokenize(
    source: Source, /, *, options: Annotated[TokenizeBenchmarkOptions, arg(name="")] = TOKENIZE_DEFAULTS
) -> None:
    """Measure the tokenization job on the whole input against a bare loop without Ray.

    Example: alit benchmark tokenize photos/ --rounds 3 --rates rates.json
    """
    from rich.console import Console

    from jobs.benchmarks.tokenization import benchmark_tokenize

    benchmark_tokenize(source, options, Console())


def train(source: Source, /, *, options: Annotated[TrainBenchmarkOptions, arg(name="")] = TRAIN_DEFAULTS) -> None:
    """Measure training steps under Ray Train against a bare loop without Ray.

    Example: alit benchmark train photos/ --stage base --steps 90 --threads 1
    """
    from rich.console import Console

    from jobs.benchmarks.training import benchmark_train

    benchmark_train(source, options, Console())


def benchmark(
    *,
    command: Annotated[
        Annotated[None, subcommand("encode", constructor=encode, prefix_name=False)]
        | Annotated[None, subcommand("tokenize", constructor=tokenize, prefix_name=False)]
        | Annotated[None, subcommand("train", constructor=train, prefix_name=False)],
        arg(name=""),
    ],
) -> None:
    """Measure ratios within one run: adaptive against fixed encoding, or a Ray job against a bare loop.

    Each pair is measured in alternation on the same machine, so that the ratios hold where absolute rates do not.

    Example: alit benchmark encode photos/
    """
