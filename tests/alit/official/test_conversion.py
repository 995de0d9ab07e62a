"""Published checkpoints, written here in the released envelope and layout, become weights folders.

The layout is spelled out a second time in this file, from STATE_DICT's tables, so that it checks alit.official and the
golden files instead of repeating them.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from paths import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

from alit.errors import CheckpointError
from alit.model import presets
from alit.official import convert, from_official
from alit.tokenizer import Alit
from alit.weights import fingerprint, load_weights

Layout = dict[str, tuple[int, ...]]

# ---------------------------------------------------------------- the published layout, independently


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
    """A weight and its bias, which is as long as the weight's first axis."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def residual(name: str, a: int, b: int, vae: bool) -> Layout:
    conv = affine if vae else lambda name, *shape: {f"{name}.weight": shape}
    out = affine(f"{name}.norm1", a) | conv(f"{name}.conv1", b, a, 3, 3)
    out |= affine(f"{name}.norm2", b) | conv(f"{name}.conv2", b, b, 3, 3)
    if a != b:
        out |= conv(f"{name}.nin_shortcut", b, a if vae else b, 1, 1)
    return out


def attention(name: str, c: int) -> Layout:
    out = affine(f"{name}.norm", c)
    for part in ("q", "k", "v", "proj_out"):
        out |= affine(f"{name}.{part}", c, c, 1, 1)
    return out


def base_layout(d: Dims) -> Layout:
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
    return core_layout(d) | base_layout(d)


def elements(shapes: Layout) -> int:
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
    width, depth = SIZES[size]
    latent = 256 if base == "vqgan" else 16
    return Dims(base=base, width=width, depth=depth, codes=4096 if quantized else None, latent=latent)


@pytest.mark.parametrize("name", MINI)
def test_conversion_golden_weights_have_the_published_layout(name):
    """The golden weights have the published layout."""
    assert {key: tuple(tensor.shape) for key, tensor in golden(name).items()} == layout(MINI[name])


@pytest.mark.parametrize(("base", "size", "quantized"), COUNTS)
def test_conversion_published_size_converts(base, size, quantized):
    """Every published size converts."""
    dims = published(base, size, quantized)
    tensors, core_params = COUNTS[base, size, quantized]
    shapes = layout(dims)
    assert len(shapes) == tensors
    assert elements(core_layout(dims)) == core_params
    assert elements(base_layout(dims)) == BASE_PARAMS[base]

    state = {name: torch.empty(shape, device="meta", dtype=torch.float16) for name, shape in shapes.items()}
    gan = {f"gan_losses.{i}.discriminator.main.0.weight": torch.empty(64, 3, 4, 4, device="meta") for i in range(8)}
    config, ours = from_official(state | gan)
    assert config == getattr(presets, size)(base="kl" if base == "vae" else base, quantized=quantized)
    assert sum(tensor.numel() for tensor in ours.values()) == core_params + BASE_PARAMS[base]
    with torch.device("meta"):
        model = Alit(config)
    assert sum(p.numel() for name, p in model.named_parameters() if not name.startswith("base.")) == core_params
    assert {name: (tensor.shape, torch.float32) for name, tensor in model.state_dict().items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in ours.items()
    }


# ---------------------------------------------------------------- whole files


@cache
def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.weights.safetensors")


@cache
def expected(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.expected.safetensors")


def envelope(ema: dict[str, Tensor], *, stage: int = 1, **arguments: object) -> dict[str, object]:
    """What the published training code saves; `model` is another one than `ema`."""
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
    torch.save(content, folder / name)
    return folder / name


def provenance(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_bytes())["provenance"]


def check_golden_ids(folder: Path) -> None:
    encoded = load_weights(folder).model.encode(expected("official-mini")["images_u8"], "fixed:256")
    assert torch.equal(torch.stack(encoded.split()), expected("official-mini")["ids_7"].long())


@pytest.mark.parametrize("stage", [1, 2])
def test_conversion_of_a_release_gives_the_golden_ids(tmp_path, stage):
    """A released checkpoint becomes weights that give the golden ids."""
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


def test_conversion_of_a_kl_model_gives_the_golden_codes(tmp_path):
    """A KL checkpoint gives the golden codes and pixels."""
    convert(write(tmp_path, envelope(golden("official-mini-kl"), stage=2)), tmp_path / "weights", heads=4)
    model, numbers = load_weights(tmp_path / "weights").model, expected("official-mini-kl")
    codes = torch.stack(model.encode(expected("official-mini")["images_u8"], "fixed:256").split())
    torch.testing.assert_close(codes, numbers["codes_7"], rtol=0, atol=1e-4)
    pixels = model.decode(numbers["codes_7"])
    torch.testing.assert_close(pixels, numbers["reconstruction_7"].clamp(0, 1), rtol=0, atol=5e-4)


def test_conversion_takes_state_dicts_and_files_without_ema(tmp_path):
    """Bare state dicts and checkpoints without ema convert to the same tensors."""
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


def test_conversion_reads_the_stage_from_the_arguments(tmp_path):
    """Stage is read from the arguments and may be overridden."""
    weights = golden("official-mini")
    stripped = write(tmp_path, envelope(weights, output_dir="./output_dir/full_finetuning/x/"))
    for stage, told in ((None, 2), (1, 1), (2, 2)):
        convert(stripped, tmp_path / "weights", heads=4, stage=stage)
        assert provenance(tmp_path / "weights")["stage"] == told
    silent = write(tmp_path, envelope(weights, output_dir=None))
    convert(silent, tmp_path / "weights", heads=4)
    assert provenance(tmp_path / "weights")["stage"] == 1


@pytest.mark.unchecked
def test_conversion_unknown_stage_is_refused():
    """An unknown stage is refused."""
    with pytest.raises(CheckpointError, match="stage must be 1 or 2, got 3"):
        from_official(golden("official-mini"), heads=4, stage=3)


def test_conversion_halting_is_chosen_by_the_caller():
    """Halting is chosen by the caller."""
    config, _ = from_official(golden("official-mini"), heads=4)
    assert config.halting == "off"
    config, _ = from_official(golden("official-mini"), heads=4, halting="sampled")
    assert (config.halting, config.halting_threshold) == ("sampled", 0.55)
    with pytest.raises(CheckpointError, match="halting='sampled' needs a discrete base"):
        from_official(golden("official-mini-kl"), heads=4, halting="sampled")


def test_conversion_copies_nothing_that_is_fp32_already():
    """Conversion copies nothing that is fp32 already."""
    state = {name: tensor.float() for name, tensor in golden("official-mini-kl").items()}
    _, ours = from_official(state, heads=4)
    assert {tensor.data_ptr() for tensor in ours.values()} == {tensor.data_ptr() for tensor in state.values()}


def test_conversion_full_size_checkpoint_converts_end_to_end(tmp_path):
    """A full size checkpoint converts end to end."""
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


# ---------------------------------------------------------------- what is refused


def refusal(checkpoint: Path, **options: object) -> str:
    """The sentence of the refusal; nothing may be left behind."""
    folder = checkpoint.parent / "weights"
    with pytest.raises(CheckpointError) as caught:
        convert(checkpoint, folder, **({"heads": 4} | options))
    assert str(checkpoint) in str(caught.value)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name] * checkpoint.exists()
    return str(caught.value)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_conversion_code_in_a_pickle_is_named_and_not_run(tmp_path):
    """Code in a pickle is named and not run."""
    target = tmp_path / "touched"
    content = envelope(golden("official-mini")) | {"epoch": Evil(target)}
    message = refusal(write(tmp_path, content))
    assert "its pickle asks for posix.system, and loading that could run code; nothing was run" in message
    assert "save its 'ema' state dict alone" in message
    assert not target.exists()
    message = refusal(write(tmp_path, envelope(golden("official-mini"), output_dir=Path("x"))))
    assert "its pickle asks for pathlib" in message
    # the Namespace is the one exception, and only here
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(write(tmp_path, {"args": argparse.Namespace()}), weights_only=True)


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
def test_conversion_wrong_tensor_is_named(tmp_path, change, sentence):
    """A wrong tensor is named."""
    weights = dict(golden("official-mini"))
    for name, shape in change.items():
        if shape is None:
            del weights[name]
        else:
            weights[name] = torch.zeros(shape)
    assert sentence in refusal(write(tmp_path, weights))


def test_conversion_unusable_values_are_named(tmp_path):
    """Unusable values are named."""
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


def test_conversion_heads_are_asked_for_where_no_preset_tells(tmp_path):
    """Heads are asked for where no preset tells."""
    message = refusal(write(tmp_path, golden("official-mini")), heads=None)
    assert "width 96 with 2 blocks is not a published preset" in message
    assert "pass heads=N" in message
    assert "width must be a multiple of heads=5" in refusal(tmp_path / "alit.pth", heads=5)


def test_conversion_other_files_are_refused_with_what_they_are(tmp_path):
    """Other files are refused with what they are."""
    prefix = "base_tokenizer.vqgan."
    weights = golden("official-mini")
    base = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    message = refusal(write(tmp_path, {"model": base}))
    assert "must hold either base_tokenizer.vqgan.* or base_tokenizer.vae.* tensors, it has neither" in message
    both = weights | golden("official-mini-kl")
    assert "it has both" in refusal(write(tmp_path, both))
    message = refusal(write(tmp_path, {"weights": {}, "epoch": 1}))
    assert "it has the keys ['epoch', 'weights']; a published checkpoint holds a state dict under 'ema'" in message
    assert "it holds a list, expected a dictionary" in refusal(write(tmp_path, [1]))
    (tmp_path / "alit.pth").write_text("<html>not found</html>")
    assert "it is not a checkpoint: " in (message := refusal(tmp_path / "alit.pth"))
    assert "this one with b'<htm'; check the download" in message
    (tmp_path / "alit.pth").unlink()
    assert "it cannot be read (No such file or directory)" in refusal(tmp_path / "alit.pth")


def test_conversion_damaged_files_are_refused(tmp_path):
    """Damaged files are refused."""
    checkpoint = write(tmp_path, envelope(golden("official-mini")))
    data = checkpoint.read_bytes()
    for keep in (4, 1000, len(data) // 2, len(data) - 1):
        checkpoint.write_bytes(data[:keep])
        assert "it is truncated or damaged (" in (message := refusal(checkpoint))
        assert message.endswith("; download it again")
    with zipfile.ZipFile(checkpoint, "w") as archive:
        archive.writestr("readme.txt", "a zip, but no checkpoint")
    assert "it is truncated or damaged (" in refusal(checkpoint)
