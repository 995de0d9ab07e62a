"""Published checkpoints become weights folders."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from published import (
    envelope,
    expected,
    golden,
    layout,
    published,
    refusal,
    write,
)
from safetensors.torch import load_file

from alit.errors import CheckpointError
from alit.model import presets
from alit.official import convert, from_official
from alit.weights import fingerprint, load_weights

pytestmark = pytest.mark.numeric


def provenance(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_bytes())["provenance"]


def check_golden_ids(folder: Path) -> None:
    encoded = load_weights(folder).model.encode(expected("official-mini")["images_u8"], "fixed:256")
    assert torch.equal(torch.stack(encoded.split()), expected("official-mini")["ids_7"].long())


@pytest.mark.parametrize("stage", [1, 2])
def test_convert_gives_the_golden_ids(tmp_path, stage):
    """A checkpoint of either stage becomes weights that give the golden ids, with its provenance."""
    checkpoint = write(tmp_path, envelope(golden("official-mini"), stage=stage))
    mark = convert(checkpoint, tmp_path / "weights", heads=4)
    assert mark == fingerprint(tmp_path / "weights")
    check_golden_ids(tmp_path / "weights")
    assert load_weights(tmp_path / "weights").model.config.mixing == {1: "hard", 2: "soft"}[stage]
    assert provenance(tmp_path / "weights") == {
        "source": "alit.pth",
        "source_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "source_envelope": "ema",
        "stage": stage,
    }
    stored = load_file(tmp_path / "weights" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    if stage == 2:
        numbers = expected("official-mini")
        pixels = load_weights(tmp_path / "weights").model.decode(numbers["ids_7"])
        torch.testing.assert_close(pixels, numbers["reconstruction_7"].clamp(0, 1), rtol=0, atol=5e-4)


def test_convert_kl_gives_the_golden_codes(tmp_path):
    """A checkpoint with a continuous base becomes weights that give the golden codes and pixels."""
    convert(write(tmp_path, envelope(golden("official-mini-kl"), stage=2)), tmp_path / "weights", heads=4)
    model, numbers = load_weights(tmp_path / "weights").model, expected("official-mini-kl")
    codes = torch.stack(model.encode(expected("official-mini")["images_u8"], "fixed:256").split())
    torch.testing.assert_close(codes, numbers["codes_7"], rtol=0, atol=1e-4)
    pixels = model.decode(numbers["codes_7"])
    torch.testing.assert_close(pixels, numbers["reconstruction_7"].clamp(0, 1), rtol=0, atol=5e-4)


def test_convert_accepts_other_envelopes(tmp_path):
    """Bare state dicts in any precision and checkpoints without `ema` give the same weights."""
    weights = golden("official-mini")
    full = {name: tensor.float() for name, tensor in weights.items()}
    without_ema = {"model": weights, "epoch": 1, "args": argparse.Namespace()}
    found = {}
    for name, content in {"bare": weights, "bare32": full, "model": without_ema}.items():
        convert(write(tmp_path, content), tmp_path / name, heads=4)
        found[name] = (tmp_path / name / "model.safetensors").read_bytes()
        assert provenance(tmp_path / name)["source_envelope"] == ("model" if name == "model" else "none")
    convert(write(tmp_path, envelope(weights)), tmp_path / "ema", heads=4)
    assert set(found.values()) == {(tmp_path / "ema" / "model.safetensors").read_bytes()}


def test_convert_reads_the_stage_from_the_arguments(tmp_path):
    """The stage is read from the saved command line, is 1 without it, and can be overridden."""
    weights = golden("official-mini")
    stripped = write(tmp_path, envelope(weights, output_dir="./output_dir/full_finetuning/x/"))
    for stage, told in ((None, 2), (1, 1), (2, 2)):
        convert(stripped, tmp_path / "weights", heads=4, stage=stage)
        assert provenance(tmp_path / "weights")["stage"] == told
    silent = write(tmp_path, envelope(weights, output_dir=None))
    convert(silent, tmp_path / "weights", heads=4)
    assert provenance(tmp_path / "weights")["stage"] == 1


@pytest.mark.unchecked
def test_from_official_refuses_unknown_stages():
    """A stage other than 1 and 2 is refused."""
    with pytest.raises(CheckpointError, match="stage must be 1 or 2, got 3"):
        from_official(golden("official-mini"), heads=4, stage=3)


def test_from_official_takes_halting_from_the_caller():
    """Halting is off unless the caller chooses it, and needs a discrete base."""
    config, _ = from_official(golden("official-mini"), heads=4)
    assert config.halting == "off"
    config, _ = from_official(golden("official-mini"), heads=4, halting="sampled")
    assert (config.halting, config.halting_threshold) == ("sampled", 0.55)
    with pytest.raises(CheckpointError, match="halting='sampled' needs a discrete base"):
        from_official(golden("official-mini-kl"), heads=4, halting="sampled")


def test_from_official_copies_no_float32_tensors():
    """Tensors that are float32 already are not copied."""
    state = {name: tensor.float() for name, tensor in golden("official-mini-kl").items()}
    _, ours = from_official(state, heads=4)
    assert {tensor.data_ptr() for tensor in ours.values()} == {tensor.data_ptr() for tensor in state.values()}


def test_convert_full_size_checkpoint(tmp_path):
    """A checkpoint of the published size is converted with every tensor in its place."""
    shapes = layout(published("vqgan", "tiny", True))
    mark_of = {name: (i % 97 + 1) / 128 for i, name in enumerate(sorted(shapes))}
    state = {name: torch.full(shape, mark_of[name], dtype=torch.float16) for name, shape in shapes.items()}
    checkpoint = write(tmp_path, {"ema": state, "epoch": 199, "args": argparse.Namespace(model="alit_tiny")})
    mark = convert(checkpoint, tmp_path / "weights")
    checkpoint.unlink()
    weights = load_weights(tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights")
    assert weights.fingerprint == mark
    assert weights.model.config == dataclasses.replace(presets.tiny(), mixing="hard")
    ours = weights.model.state_dict()
    for name, official in {
        "encoder.blocks.7.attention.qkv.weight": "encoder.transformer.7.attn.in_proj_weight",
        "decoder.mask_token": "decoder_mask_token",
        "encoder.iteration_embedding": "timestep_embedding",
        "base.decoder.levels.0.1.conv2.weight": "base_tokenizer.vqgan.decoder.up.4.block.1.conv2.weight",
        "base.decoder.upsamples.3.bias": "base_tokenizer.vqgan.decoder.up.1.upsample.conv.bias",
        "base.encoder.levels.2.0.shortcut.weight": "base_tokenizer.vqgan.encoder.down.2.block.0.nin_shortcut.weight",
    }.items():
        assert ours[name].unique().tolist() == [mark_of[official]]


DOWN = "base_tokenizer.vqgan.encoder.down.1.block.0.conv1.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"decoder.ffn.0.bias": None}, "tensor 'decoder.ffn.0.bias' is missing; expected the shape (192,)"),
        ({"encoder_class_embedding": None}, "tensor 'encoder_class_embedding' is missing"),
        ({DOWN: None}, f"tensor '{DOWN}' is missing"),
        ({"decoder.extra.weight": (2,)}, "tensor 'decoder.extra.weight' has no place in the published layout"),
        ({"encoder.transformer.2.ln_1.weight": (96,)}, "tensor 'encoder.transformer.2.ln_1.bias' is missing"),
        ({"module.latent_tokens": (32, 96)}, "tensor 'module.latent_tokens' has no place in the published layout"),
        (
            {"decoder_mask_token": (1, 96)},
            "tensor 'decoder_mask_token' has the shape (1, 96), expected (1, 1, 96)",
        ),
        (
            {"patch_embed.weight": (64, 3, 8, 8)},
            "tensor 'patch_embed.weight' has the shape (64, 3, 8, 8), expected (64, 3, 16, 16)",
        ),
        ({"latent_tokens": (32,)}, "tensor 'latent_tokens' has the shape (32,), expected 2 axes"),
        ({"encoder_positional_embedding": (256, 96)}, "has 256 rows, expected one more than a square number"),
        ({"latent_tokens": (5000, 1)}, "latents_per_iteration must be a whole number from 1 to 4096, got 5000"),
        ({DOWN: (48, 1, 1, 1)}, "each entry of channels must be a multiple of norm_groups=32, got 48"),
    ],
)
def test_convert_names_wrong_tensors(tmp_path, change, sentence):
    """A tensor that is missing, unknown or of another shape is named."""
    weights = dict(golden("official-mini"))
    for name, shape in change.items():
        if shape is None:
            del weights[name]
        else:
            weights[name] = torch.zeros(shape)
    assert sentence in refusal(write(tmp_path, weights))


def test_convert_names_unusable_values(tmp_path):
    """A tensor with NaN, of another type or repeated without end is named."""
    weights = golden("official-mini")
    for value, sentence in (
        (torch.full((32, 96), torch.nan), "tensor 'latent_tokens' holds NaN or infinity"),
        (torch.zeros(32, 96, dtype=torch.int64), "tensor 'latent_tokens' is torch.strided, torch.int64 on cpu"),
        (torch.zeros(32, 96).to_sparse(), "tensor 'latent_tokens' is torch.sparse_coo, torch.float32 on cpu"),
        ([1.0], "entry 'latent_tokens' of its state dict is a list, expected a tensor"),
    ):
        assert sentence in refusal(write(tmp_path, {"ema": weights | {"latent_tokens": value}}))
    huge = torch.zeros(1).expand(10**6, 10**6)
    message = refusal(write(tmp_path, {"ema": weights | {"encoder_positional_embedding": huge}}))
    assert "its tensors claim 4000003" in message
