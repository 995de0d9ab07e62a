"""The command `alit convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


def convert(
    checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]],
    folder: Positional[Annotated[Path, arg(metavar="FOLDER")]],
    /,
    *,
    heads: int | None = None,
    stage: Literal[1, 2] | None = None,
    halting: Literal["off", "deterministic", "sampled"] = "off",
    halting_threshold: float = 0.55,
) -> None:
    """Convert a published ALIT checkpoint (.pth) to a weights folder. Only tensors are unpickled.

    Example: alit convert alit_vqgan_small_quantized_latent.pth weights/small

    Args:
        checkpoint: One of the released files.
        folder: The weights folder to write.
        heads: Number of attention heads; required if the widths are not those of a released model.
        stage: 1 for latent distillation, 2 for full finetuning; detected from the file by default.
        halting: The dynamic halting mask at inference.
        halting_threshold: Probability at or above which a base token is halted.
    """
    from alit.official import convert as convert_checkpoint

    fingerprint = convert_checkpoint(
        checkpoint, folder, heads=heads, stage=stage, halting=halting, halting_threshold=halting_threshold
    )
    print(f"{folder}: fingerprint {fingerprint}")
