"""The `alit` command: one subcommand per job. Heavy imports wait until a job is chosen, so that help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

CRITERION_HELP = (
    "When an image has enough tokens: fixed:N, l1:T, mse:T, psnr:T, ssim:T, code:T, latent:T or "
    "package.module:function@T. The weights' own default when not given."
)


def tokenize(
    source: Positional[str],
    output: Positional[str],
    /,
    *,
    criterion: Annotated[str | None, tyro.conf.arg(help=CRITERION_HELP)] = None,
    weights: str | None = None,
    batch_size: int = 64,
    rows_per_file: int = 1024,
    keep: tuple[str, ...] = (),
    image_column: str = "image",
    id_column: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    decode_workers: int | None = None,
    gpus_per_worker: float | None = None,
    max_bytes: int = 64 * 1024**2,
    max_pixels: int = 89_478_485,
) -> None:
    """Turn images into a Parquet dataset of adaptive-length tokens.

    Every image ends up in OUTPUT/data or, with the reason, in OUTPUT/_rejects. Run the same command again after an
    interruption: finished files are kept, the rest is done.

    Example: alit tokenize photos/ tokens/ --criterion l1:0.1

    Args:
        source: A folder of images or of Parquet files, a glob in quotes, one Parquet file, or an s3:// URI.
        output: The dataset's folder, local or s3://.
        weights: A weights folder; the packaged one when not given.
        batch_size: Images per forward pass.
        rows_per_file: Images per output file: the unit of work, and of what is redone after an interruption.
        keep: Parquet columns to carry through, such as --keep label caption.
        image_column: The Parquet column with the images' bytes.
        id_column: The Parquet column with unique ids; file#row when not given.
        overwrite: Replace a token dataset that is already there.
        workers: Processes that hold the model; one per CPU, or per GPU where there is one.
        decode_workers: CPU tasks that decode for the workers; 0 lets each worker decode for itself.
        gpus_per_worker: GPUs a worker takes; 1 where there is one.
        max_bytes: Larger files are rejected.
        max_pixels: Larger images are rejected.
    """
    from rich.console import Console

    from alit.images import Limits
    from jobs import tokenize as job

    console = Console(stderr=True)
    summary = job.tokenize(
        source,
        output,
        criterion=criterion,
        weights=weights,
        batch_size=batch_size,
        rows_per_file=rows_per_file,
        keep=keep,
        image_column=image_column,
        id_column=id_column,
        overwrite=overwrite,
        workers=workers,
        decode_workers=decode_workers,
        gpus_per_worker=gpus_per_worker,
        limits=Limits(max_bytes=max_bytes, max_pixels=max_pixels),
        console=console,
    )
    job.describe(summary, console)


COMMANDS: dict[str, Callable[..., Any]] = {"tokenize": tokenize}


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; what a person can put right is one sentence on stderr and exit code 2."""
    from alit.errors import AlitError

    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, args=arguments, prog="alit", description="Images into adaptive-length token datasets, and back."
        )
    except AlitError as error:
        print(f"alit: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("alit: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
