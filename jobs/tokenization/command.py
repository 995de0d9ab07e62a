"""The commands `alit tokenize` and `alit estimate`. Heavy imports wait for the job, so that help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from jobs.tokenization.capacity import EstimateOptions
from jobs.tokenization.options import INPUT_HELP, TokenizeOptions

TOKENIZE_DEFAULTS = TokenizeOptions()


def tokenize(
    source: Positional[Annotated[str, arg(metavar="INPUT", help=INPUT_HELP)]],
    output: Positional[Annotated[str, arg(metavar="OUTPUT")]],
    /,
    *,
    options: Annotated[TokenizeOptions, arg(name="")] = TOKENIZE_DEFAULTS,
) -> None:
    """Turn images into a Parquet dataset of adaptive-length tokens.

    Every image ends up in OUTPUT/data or, with the reason, in OUTPUT/_rejects. After an interruption, run the same
    command again: finished files are kept, and the remaining ones are written.

    Example: alit tokenize photos/ tokens/ --criterion l1:0.1

    Args:
        source: The images.
        output: The dataset's folder, local or s3://.
        options: How they are tokenized.
    """
    from rich.console import Console

    from jobs.tokenization import job

    console = Console(stderr=True)
    if options.dry_run:
        job.preview(source, output, options, console)
    else:
        job.print_summary(job.tokenize(source, output, options, console), console)


def estimate(
    what: Positional[Literal["tokenize"]],
    /,
    *,
    rates: Path,
    options: Annotated[EstimateOptions, arg(name="")],
) -> None:
    """Estimate time, storage and cost of tokenizing a corpus, and list the assumptions.

    Example: alit benchmark tokenize photos/ --rates rates.json, then alit estimate tokenize --rates rates.json
    --images 1e9 --gpus 64 --worker-hour 2.5

    Args:
        what: The job.
        rates: Rates measured by alit benchmark tokenize --rates, on a machine like those that will do the work.
        options: The corpus, the workers and the prices.
    """
    from rich.console import Console

    from jobs.tokenization import capacity

    capacity.print_estimate(capacity.Rates.read(rates), options, Console())
