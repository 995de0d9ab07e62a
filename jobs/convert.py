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
    """Turn a published ALIT checkpoint (.pth) into a weights folder. Nothing in it but tensors is unpickled.

    Example: alit convert alit_vqgan_small_quantized_latent.pth weights/small

    Args:
        checkpoint: One of the released files.
        folder: The weights folder to write.
        heads: Attention heads, where the widths are none of the published ones.
        stage: 1 for latent distillation, 2 for full finetuning; told from the file when not given.
        halting: The dynamic halting mask at inference.
        halting_threshold: The probability from which a base token is halted.
    """
    from alit.official import convert as run

    mark = run(checkpoint, folder, heads=heads, stage=stage, halting=halting, halting_threshold=halting_threshold)
    print(f"{folder}: fingerprint {mark}")
