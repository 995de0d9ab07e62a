"""Reading of a published checkpoint, an untrusted pickle.

Nothing in it is executed: torch's restricted unpickler reads tensors and one `argparse.Namespace`, and refuses
everything else.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from alit.errors import CheckpointError
from alit.official.architecture import PublishedStage
from alit.official.names import GAN

STAGES: dict[str, PublishedStage] = {"full_finetuning": 2, "latent_distillation_pretrain": 1}
"""Stages by their names in the published training arguments."""

_ENVELOPES = "a published checkpoint holds a state dict under 'ema' or 'model', or is one itself"


class Checkpoint(NamedTuple):
    """The state dict of a published checkpoint file.

    Attributes:
        envelope: The key of the state dict in the file: "ema", "model", or "none" for a bare state dict.
        state: The tensors under their published names, mapped from the file rather than read.
        stage: The training stage that the saved training arguments name, if any.
    """

    envelope: str
    state: dict[str, Tensor]
    stage: PublishedStage | None


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a published checkpoint file without executing anything in it.

    Raises:
        CheckpointError: The file is not a checkpoint, is truncated, would run code, or holds something other than
            plain floating-point tensors.
    """
    content = _load(path)
    envelope, state = _unwrap(content)
    _require_real_size(state, path.stat().st_size)
    return Checkpoint(envelope, state, _stage_of_arguments(content.get("args")))


def has_gan(state: Mapping[str, Tensor]) -> bool:
    """Returns whether a state dict holds the tensors of stage 2's losses."""
    return any(name.startswith(GAN) for name in state)


def _load(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error.strerror})") from error
    if start != b"PK\x03\x04":
        raise CheckpointError(
            f"it is not a checkpoint: a file that torch.save writes (since PyTorch 1.6) starts with b'PK', this one "
            f"with {start!r}; check the download"
        )
    with safe_globals([argparse.Namespace]):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            names = ", ".join(_forbidden(path)) or "something that torch.load(weights_only=True) refuses"
            raise CheckpointError(
                f"its pickle asks for {names}, and loading that could run code; nothing was run. If you trust its "
                f"author, save its 'ema' state dict alone to a new file and convert that"
            ) from error
        except Exception as error:  # a damaged file can make the reader fail in any way
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"it is truncated or damaged ({type(error).__name__}: {reason}); download it again"
            ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"it holds a {type(content).__name__}, expected a dictionary; {_ENVELOPES}")
    return content


def _forbidden(path: Path) -> Iterator[str]:
    """Yields the globals that a refused pickle names, for the error message only."""
    try:
        yield from sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the pickle is refused already, and may defeat this reader too
        return


def _unwrap(content: dict[Any, Any]) -> tuple[str, dict[str, Tensor]]:
    """Returns the key of the state dict in the file, and the state dict."""
    for envelope in ("ema", "model"):
        if isinstance(content.get(envelope), dict):
            state = content[envelope]
            break
    else:
        envelope, state = "none", content
        if not any(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(f"it has the keys {sorted(map(str, content))[:10]}; {_ENVELOPES}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"entry {name!r} of its state dict is a {type(tensor).__name__}, expected a tensor")
        if name.startswith(GAN):
            continue
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
            raise CheckpointError(
                f"tensor {name!r} is {tensor.layout}, {tensor.dtype} on {tensor.device.type}; expected plain floats"
            )
    return envelope, state


def _require_real_size(state: dict[str, Tensor], size: int) -> None:
    """Refuses tensors that repeat a small storage (stride 0): copying them could take unbounded memory."""
    claimed = sum(tensor.nbytes for name, tensor in state.items() if not name.startswith(GAN))
    if claimed > size:
        raise CheckpointError(f"its tensors claim {claimed} bytes, but the file has only {size}; it is not as saved")


def _stage_of_arguments(arguments: object) -> PublishedStage | None:
    """Returns the training stage that the saved command line names."""
    if isinstance(arguments, argparse.Namespace):
        for value in (vars(arguments).get("train_stage"), vars(arguments).get("output_dir")):
            for name, stage in STAGES.items():
                if isinstance(value, str) and name in value:
                    return stage
    return None
