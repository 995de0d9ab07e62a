"""Published checkpoints: their layout, written down a second time, and files in their envelope.

The layout is independent of `alit.official`, so that tests check that module and the golden files instead of repeating
them.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from paths import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

from alit.errors import CheckpointError
from alit.official import convert

Layout = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dims:
    base: str
    width: int
    depth: int
    codes: int | None
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    latent: int = 256
    base_codes: int = 1024


def affine(name: str, *weight: int) -> Layout:
    """Returns a weight and its bias, which is as long as the weight's first axis."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def residual(name: str, a: int, b: int, vae: bool) -> Layout:
    """Returns a residual block."""
    conv = affine if vae else lambda name, *shape: {f"{name}.weight": shape}
    out = affine(f"{name}.norm1", a) | conv(f"{name}.conv1", b, a, 3, 3)
    out |= affine(f"{name}.norm2", b) | conv(f"{name}.conv2", b, b, 3, 3)
    if a != b:
        out |= conv(f"{name}.nin_shortcut", b, a if vae else b, 1, 1)
    return out


def attention(name: str, c: int) -> Layout:
    """Returns an attention block."""
    out = affine(f"{name}.norm", c)
    for part in ("q", "k", "v", "proj_out"):
        out |= affine(f"{name}.{part}", c, c, 1, 1)
    return out


def base_layout(d: Dims) -> Layout:
    """Returns the tensors of the base tokenizer."""
    vae, channels, last = d.base == "vae", d.channels, len(d.channels) - 1
    top = channels[-1]
    out = affine("encoder.conv_in", channels[0], 3, 3, 3) if vae else {"encoder.conv_in.weight": (channels[0], 3, 3, 3)}
    width = channels[0]
    for level, c in enumerate(channels):
        for block in range(2):
            out |= residual(f"encoder.down.{level}.block.{block}", width, c, vae)
            width = c
            if vae and level == last:
                out |= attention(f"encoder.down.{level}.attn.{block}", c)
        if vae and level < last:
            out |= affine(f"encoder.down.{level}.downsample.conv", c, c, 3, 3)
    for level in range(last, -1, -1):
        c = channels[level]
        for block in range(3 if vae else 2):
            out |= residual(f"decoder.up.{level}.block.{block}", width, c, vae)
            width = c
        if level:
            out |= affine(f"decoder.up.{level}.upsample.conv", c, c, 3, 3)
    for half in ("encoder", "decoder"):
        for block in (1, 2):
            out |= residual(f"{half}.mid.block_{block}", top, top, vae)
        if vae:
            out |= attention(f"{half}.mid.attn_1", top)
    out |= affine("encoder.norm_out", top) | affine("decoder.norm_out", channels[0])
    out |= affine("decoder.conv_in", top, d.latent, 3, 3) | affine("decoder.conv_out", 3, channels[0], 3, 3)
    if vae:
        out |= affine("encoder.conv_out", 2 * d.latent, top, 3, 3)
        out |= affine("quant_conv", 2 * d.latent, 2 * d.latent, 1, 1)
        out |= affine("post_quant_conv", d.latent, d.latent, 1, 1)
    else:
        out |= affine("encoder.conv_out", d.latent, top, 1, 1)
        out |= {"quantize.embedding.weight": (d.base_codes, d.latent)}
    return {f"base_tokenizer.{d.base}.{name}": shape for name, shape in out.items()}


def core_layout(d: Dims) -> Layout:
    """Returns the tensors of latent distillation."""
    w = d.width
    out: Layout = {"latent_tokens": (32, w), "latent_token_positional_embedding": (32, w)}
    out |= {"timestep_embedding": (8, 32, w), "decoder.latent_token_positional_embedding": (256, w)}
    for half in ("encoder", "decoder"):
        out |= {f"{half}_positional_embedding": (257, w), f"{half}_class_embedding": (1, w)}
        out |= {f"{half}_mask_token": (1, 1, w)}
        for i in range(d.depth):
            block = f"{half}.transformer.{i}"
            out |= affine(f"{block}.ln_1", w) | affine(f"{block}.ln_2", w)
            out |= {f"{block}.attn.in_proj_weight": (3 * w, w), f"{block}.attn.in_proj_bias": (3 * w,)}
            out |= affine(f"{block}.attn.out_proj", w, w)
            out |= affine(f"{block}.mlp.c_fc", 4 * w, w) | affine(f"{block}.mlp.c_proj", w, 4 * w)
    for norm in ("encoder_ln_pre", "encoder_ln_post", "encoder_ln_recursive", "decoder.ln_pre", "decoder.ln_post"):
        out |= affine(norm, w)
    out |= affine("pre_quantizer_mlp", 12, w) | affine("decoder.decoder_embed", w, 12)
    out |= affine("decoder.ffn.0", 2 * w, w)
    out |= affine("decoder.ffn.2", d.base_codes if d.base == "vqgan" else d.latent, 2 * w)
    out |= affine("patch_embed", w - d.latent, 3, 16, 16)
    if d.codes:
        out |= {"quantize.embedding.weight": (d.codes, 12)}
    return out


def layout(d: Dims) -> Layout:
    """Returns the shapes of all tensors, by name."""
    return core_layout(d) | base_layout(d)


def elements(shapes: Layout) -> int:
    """Returns the number of elements of all tensors."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


MINI_CHANNELS = (32, 32, 32, 32, 64)
MINI = {
    "official-mini": Dims(base="vqgan", width=96, depth=2, codes=512, channels=MINI_CHANNELS, latent=32, base_codes=64),
    "official-mini-kl": Dims(base="vae", width=96, depth=2, codes=None, channels=MINI_CHANNELS, latent=16),
}
SIZES = {"tiny": (512, 8), "small": (1024, 8), "base": (768, 12), "semilarge": (1024, 16)}
BASE_PARAMS = {"vqgan": 54515587, "vae": 66456019}
# tensors (stage 1) and core parameters, per base, preset, quantized
COUNTS = {
    ("vqgan", "tiny", True): (391, 52837132),
    ("vqgan", "tiny", False): (390, 52787980),
    ("vqgan", "small", True): (391, 207532812),
    ("vqgan", "small", False): (390, 207483660),
    ("vqgan", "base", True): (487, 174173964),
    ("vqgan", "base", False): (486, 174124812),
    ("vqgan", "semilarge", True): (583, 409072396),
    ("vqgan", "semilarge", False): (582, 409023244),
    ("vae", "tiny", True): (535, 51988492),
    ("vae", "tiny", False): (534, 51939340),
    ("vae", "small", True): (535, 205651980),
    ("vae", "small", False): (534, 205602828),
    ("vae", "base", True): (631, 172809228),
    ("vae", "base", False): (630, 172760076),
    ("vae", "semilarge", True): (727, 407191564),
    ("vae", "semilarge", False): (726, 407142412),
}


def published(base: str, size: str, quantized: bool) -> Dims:
    """Returns the dimensions of a published model."""
    width, depth = SIZES[size]
    latent = 256 if base == "vqgan" else 16
    return Dims(base=base, width=width, depth=depth, codes=4096 if quantized else None, latent=latent)


@cache
def golden(name: str) -> dict[str, Tensor]:
    """Returns the tensors of a golden file in the published layout."""
    return load_file(GOLDEN / f"{name}.weights.safetensors")


@cache
def expected(name: str) -> dict[str, Tensor]:
    """Returns the numbers that the published code gave for a golden file."""
    return load_file(GOLDEN / f"{name}.expected.safetensors")


def envelope(ema: dict[str, Tensor], *, stage: int = 1, **arguments: object) -> dict[str, object]:
    """Returns what the published training code saves; `model` is another one than `ema`."""
    names = {1: "latent_distillation_pretrain", 2: "full_finetuning"}
    if stage == 2:
        ema = ema | {
            "gan_losses.0.perceptual_loss.scaling_layer.shift": torch.zeros(1, 3, 1, 1),
            "gan_losses.7.discriminator.main.3.num_batches_tracked": torch.tensor(7),
        }
    arguments = {"batch_size": 32, "lr": None, "betas": (0.9, 0.95), "device": "cuda"} | arguments
    arguments.setdefault("output_dir", f"./output_dir/{names[stage]}/alit/")
    saved = {
        "model": {name: tensor + 1 for name, tensor in ema.items()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, 2)}},
            "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0]}],
        },
        "ema": ema,
        "epoch": 199,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 5},
        "args": argparse.Namespace(**arguments),
    }
    if stage == 2:
        saved |= {"optimizer_discriminator": {"state": {}, "param_groups": []}, "scaler_discriminator": {"scale": 1.0}}
    return saved


def write(folder: Path, content: object, name: str = "alit.pth") -> Path:
    """Writes a checkpoint file, and returns its path."""
    torch.save(content, folder / name)
    return folder / name


def refusal(checkpoint: Path, **options: object) -> str:
    """Returns the message with which a file is refused; nothing may be left behind."""
    folder = checkpoint.parent / "weights"
    with pytest.raises(CheckpointError) as caught:
        convert(checkpoint, folder, **({"heads": 4} | options))
    assert str(checkpoint) in str(caught.value)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name] * checkpoint.exists()
    return str(caught.value)
