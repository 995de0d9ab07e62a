"""Training runs of a small model: their data, options and results."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from small_models import TINY, random_model

from alit.images.encode import encode_image
from alit.weights import save_weights

HALTING = dataclasses.replace(TINY, halting="sampled", halting_threshold=0.03)


def write_smooth_images(folder: Path) -> Path:
    """Writes forty smooth images and one broken file, and returns the folder."""
    random = np.random.default_rng(0)
    for i in range(40):
        coarse = torch.from_numpy(random.random((1, 3, 5, 5), np.float32))
        pixels = torch.nn.functional.interpolate(coarse, size=24, mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
        (folder / f"{i:02}.png").write_bytes(encode_image((255 * pixels).numpy().astype(np.uint8)))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    return folder


def save_base(folder: Path) -> Path:
    """Saves an untrained base to distill, and returns its folder."""
    save_weights(folder, random_model(HALTING), provenance={"stage": "base"})
    return folder


OPTIONS = ["--batch-size", "8", "--warmup", "5", "--quantize-from", "10", "--quantize-over", "20", "--pixel-from", "0"]
OPTIONS += ["--grad-iterations", "2", "--log-every", "50", "--threads", "1", "--no-bf16"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the final weights of a run."""
    return safetensors.torch.load_file(folder / "weights" / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Asserts that two sets of weights are bitwise equal."""
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
