"""Weights folders: `config.json` and `model.safetensors`, and the fingerprint of both. No pickles are involved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from alit.encoding.criteria import parse
from alit.errors import WeightsError
from alit.model.config import AlitConfig
from alit.tokenizer import Alit

CONFIG = "config.json"
MODEL = "model.safetensors"
FORMAT = 1
PREPROCESSING = {"color": "sRGB", "range": [0, 1], "resize": "bicubic, antialiased, short side", "crop": "center"}
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A loaded weights folder.

    Attributes:
        model: The model, on the CPU, in fp32, in eval mode.
        fingerprint: The SHA-256 of both files, hexadecimal.
        provenance: The record of its training or conversion, as stored.
        folder: The folder that was read.
    """

    model: Alit
    fingerprint: str
    provenance: dict[str, Any]
    folder: Path


def default_weights() -> Path:
    """Returns the folder of the packaged weights, the default of every command."""
    return Path(__file__).parent / "default_weights"


def fingerprint(folder: str | Path) -> str:
    """Returns the SHA-256 of `config.json` and `model.safetensors`, each preceded by its length; hexadecimal.

    Raises:
        WeightsError: A file cannot be read.
    """
    digest = hashlib.sha256()
    for name in (CONFIG, MODEL):
        path = Path(folder) / name
        try:
            with path.open("rb") as file:
                digest.update(path.stat().st_size.to_bytes(8, "big"))
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise WeightsError(
                f"no weights in {str(folder)!r}: {name} cannot be read ({error.strerror}); a weights folder holds "
                f"{CONFIG} and {MODEL}"
            ) from error
    return digest.hexdigest()


def read_config(folder: str | Path | None = None) -> tuple[AlitConfig, str]:
    """Reads the config and the fingerprint of a weights folder, without loading the model.

    Args:
        folder: The weights folder; the packaged one when None.

    Raises:
        WeightsError: A file is missing, or the config cannot be used.
    """
    folder = Path(folder) if folder is not None else default_weights()
    mark = fingerprint(folder)
    return _read_config(folder / CONFIG)[0], mark


def load_weights(folder: str | Path | None = None) -> Weights:
    """Loads a weights folder.

    Args:
        folder: The weights folder; the packaged one when None.

    Raises:
        WeightsError: A file is missing, truncated or does not fit the other; the message names it.
    """
    folder = Path(folder) if folder is not None else default_weights()
    mark = fingerprint(folder)
    config, provenance = _read_config(folder / CONFIG)
    try:  # memory-mapped, so that processes on one machine share tensors stored in fp32
        tensors = load_file(folder / MODEL)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{str(folder / MODEL)!r} is not a complete safetensors file ({error}); copy or download it again"
        ) from error
    with torch.device("meta"):
        model = Alit(config)
    _require_same_layout(model.state_dict(), tensors, folder / MODEL)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    model.reset_buffers()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return Weights(model=model.eval(), fingerprint=mark, provenance=provenance, folder=folder)


def _read_config(path: Path) -> tuple[AlitConfig, dict[str, Any]]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise WeightsError(f"{str(path)!r} is larger than {MAX_CONFIG_BYTES} bytes; it is not a weights config")
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            other = data.get("format") if isinstance(data, dict) else None
            raise WeightsError(f"{str(path)!r} has format {other!r}; this version reads format {FORMAT}")
        if data.get("preprocessing") != PREPROCESSING:
            raise WeightsError(f"{str(path)!r} asks for preprocessing that this version does not support")
        config = AlitConfig.from_json(data["model"])
        # the default criterion is part of an untrusted file: it must not name code to import
        parse(config.criterion, functions=False).check(config)
        provenance = data.get("provenance", {})
        if not isinstance(provenance, dict):
            raise WeightsError(f"{str(path)!r} has a provenance that is not an object: {provenance!r}")
        return config, provenance
    except WeightsError:
        raise
    except KeyError as error:
        raise WeightsError(f"{str(path)!r} has no {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{str(path)!r} cannot be used: {error}") from error


def _require_same_layout(expected: dict[str, Any], stored: dict[str, Any], path: Path) -> None:
    for name, tensor in expected.items():
        if name not in stored:
            raise WeightsError(f"{str(path)!r} does not fit its config: tensor {name!r} is missing")
        if stored[name].shape != tensor.shape:
            raise WeightsError(
                f"{str(path)!r} does not fit its config: tensor {name!r} has the shape {tuple(stored[name].shape)}, "
                f"the config asks for {tuple(tensor.shape)}"
            )
    extra = sorted(set(stored) - set(expected))
    if extra:
        raise WeightsError(f"{str(path)!r} does not fit its config: it has an unknown tensor {extra[0]!r}")


def _replaceable(folder: Path) -> bool:
    """Returns whether a folder is empty or a weights folder of this library: others have a config.json too."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and {"format", "model", "preprocessing"} <= config.keys()


def save_weights(
    folder: str | Path, model: Alit, *, provenance: dict[str, Any], dtype: torch.dtype = torch.float32
) -> str:
    """Writes a weights folder atomically.

    Args:
        folder: The folder to write; replaced if it is a weights folder.
        model: The model; only its parameters are stored.
        provenance: The record of the weights' training or conversion; plain JSON values.
        dtype: The floating-point type on disk; float16 halves the file.

    Returns:
        The fingerprint of the weights.

    Raises:
        WeightsError: The folder exists and is something else.
    """
    folder = Path(folder)
    if folder.exists() and not _replaceable(folder):
        raise WeightsError(f"{str(folder)!r} exists and is not a weights folder; name another or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        state = {name: tensor.detach().to(dtype).contiguous().cpu() for name, tensor in model.state_dict().items()}
        save_file(state, staging / MODEL)
        config = {
            "format": FORMAT,
            "model": model.config.to_json(),
            "preprocessing": PREPROCESSING,
            "provenance": provenance,
        }
        (staging / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        os.chmod(staging, 0o755)
        for name in (CONFIG, MODEL):
            os.chmod(staging / name, 0o644)
        mark = fingerprint(staging)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent)) / "weights"
            folder.rename(old)
            staging.rename(folder)
            shutil.rmtree(old.parent)
        else:
            staging.rename(folder)
        return mark
    finally:
        shutil.rmtree(staging, ignore_errors=True)
