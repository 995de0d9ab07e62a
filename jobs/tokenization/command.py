"""The commands `alit tokenize` and `alit plan`. Heavy imports wait for the job, so that help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from jobs.tokenization.capacity import PlanOptions
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

    Every image ends up in OUTPUT/data or, with the reason, in OUTPUT/_rejects. Run the same command again after an
    interruption: finished files are kept, the rest is done.

    Example: alit tokenize photos/ tokens/ --criterion l1:0.1

    Args:
        output: The dataset's folder, local or s3://.
    """
    from rich.console import Console

    from jobs.tokenization import job

    console = Console(stderr=True)
    if options.dry_run:
        job.preview(source, output, options, console)
    else:
        job.describe(job.tokenize(source, output, options, console), console)


def plan(
    what: Positional[Literal["tokenize"]],
    /,
    *,
    rates: Path,
    options: Annotated[PlanOptions, arg(name="")],
) -> None:
    """Say what tokenizing a corpus would take: hours, storage, requests and money, with all that is assumed.

    Example: alit benchmark tokenize photos/ --rates rates.json, then alit plan tokenize --rates rates.json --images 1e9
    --gpus 64 --worker-hour 2.5

    Args:
        what: The job.
        rates: What alit benchmark tokenize --rates measured, on a machine like those that will do the work.
    """
    from rich.console import Console

    from jobs.tokenization import capacity

    capacity.plan(capacity.Rates.read(rates), options, Console())
