"""The command `alit verify`."""

from __future__ import annotations

import sys
from typing import Annotated

from tyro.conf import Positional, arg


def verify(
    dataset: Positional[Annotated[str, arg(metavar="DATASET")]],
    /,
) -> None:
    """Check a token dataset: every planned image exactly once, whole files, checksums, lengths, ids, metadata.

    Prints every problem with the file it is in, and exits with code 1 if there are any.

    Example: alit verify tokens/

    Args:
        dataset: The dataset's folder, local or s3://.
    """
    from rich.console import Console

    from jobs.dataset import verify as job

    sys.exit(0 if job.verify(dataset, Console(stderr=True)) else 1)
