"""The published checkpoints (ShivamDuggal4/adaptive-length-tokenizer) into a weights folder.

The published files are pickles. Nothing in them is run: torch's restricted unpickler reads tensors and one
`argparse.Namespace`, everything else is refused. What comes out is a weights folder like any other.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from alit.errors import CheckpointError, ConfigError
from alit.model.config import AlitConfig, Halting, KLConfig, VQGANConfig
from alit.tokenizer import Alit
from alit.weights import save_weights

Stage = Literal[1, 2]

# heads leave no trace in the shapes; (width, depth) names the published preset
PUBLISHED_HEADS = {(512, 8): 8, (1024, 8): 8, (768, 12): 12, (1024, 16): 16}

GAN = "gan_losses."  # stage 2's discriminators and perceptual nets, of no use after training
VQGAN_PREFIX, KL_PREFIX = "base_tokenizer.vqgan.", "base_tokenizer.vae."
STAGES: dict[str, Stage] = {"full_finetuning": 2, "latent_distillation_pretrain": 1}

# Our name to the published one: every rule is applied, in this order. "up.-i" counts levels from the coarsest.
_RENAMES = [
    (re.compile(ours), published)
    for ours, published in (
        # latent distillation
        (r"^(encoder|decoder)\.positions$", r"\1_positional_embedding"),
        (r"^(encoder|decoder)\.(class_embedding|mask_token)$", r"\1_\2"),
        (r"^encoder\.latent_tokens$", "latent_tokens"),
        (r"^encoder\.latent_positions$", "latent_token_positional_embedding"),
        (r"^encoder\.iteration_embedding$", "timestep_embedding"),
        (r"^encoder\.norm_(pre|post|recursive)\.", r"encoder_ln_\1."),
        (r"^encoder\.to_code\.", "pre_quantizer_mlp."),
        (r"^encoder\.patch_embed\.", "patch_embed."),
        (r"^codebook\.", "quantize.embedding."),
        (r"^decoder\.code_positions$", "decoder.latent_token_positional_embedding"),
        (r"^decoder\.code_embed\.", "decoder.decoder_embed."),
        (r"^decoder\.norm_(pre|post)\.", r"decoder.ln_\1."),
        (r"^decoder\.head\.", "decoder.ffn."),
        (r"^(encoder|decoder)\.blocks\.", r"\1.transformer."),
        (r"\.norm_attention\.", ".ln_1."),
        (r"\.attention\.qkv\.", ".attn.in_proj_"),
        (r"\.attention\.out\.", ".attn.out_proj."),
        (r"\.norm_mlp\.", ".ln_2."),
        (r"\.mlp\.0\.", ".mlp.c_fc."),
        (r"\.mlp\.2\.", ".mlp.c_proj."),
        # KL base: diffusers' names
        (r"^base\.autoencoder\.", KL_PREFIX),
        (r"\.down_blocks\.", ".down."),
        (r"\.up_blocks\.", ".up.-"),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
        (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.resnets\.", ".block."),
        (r"\.attentions\.", ".attn."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"\.conv_norm_out\.", ".norm_out."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.group_norm\.", ".norm."),
        (r"\.to_(q|k|v)\.", r".\1."),
        (r"\.to_out\.0\.", ".proj_out."),
        # VQGAN base
        (r"^base\.codebook\.", f"{VQGAN_PREFIX}quantize.embedding."),
        (r"^base\.encoder\.levels\.(\d+)\.", rf"{VQGAN_PREFIX}encoder.down.\1.block."),
        (r"^base\.decoder\.levels\.(\d+)\.", rf"{VQGAN_PREFIX}decoder.up.-\1.block."),
        (r"^base\.decoder\.upsamples\.(\d+)\.", rf"{VQGAN_PREFIX}decoder.up.-\1.upsample.conv."),
        (r"^base\.(encoder|decoder)\.mid\.0\.", rf"{VQGAN_PREFIX}\1.mid.block_1."),
        (r"^base\.(encoder|decoder)\.mid\.1\.", rf"{VQGAN_PREFIX}\1.mid.block_2."),
        (r"^base\.", VQGAN_PREFIX),
        (r"\.shortcut\.", ".nin_shortcut."),
    )
]

# Published tensors that carry extra axes of one, by their published name.
_EXTRA_AXES: list[tuple[re.Pattern[str], Callable[[tuple[int, ...]], tuple[int, ...]]]] = [
    (re.compile(r"^(encoder|decoder)_mask_token$"), lambda shape: (1, *shape)),
    (re.compile(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$"), lambda shape: (*shape, 1, 1)),
]


class Converted(NamedTuple):
    """A published state dict as this library's own."""

    config: AlitConfig
    state: dict[str, Tensor]
    """Fits `Alit(config)`; fp32, and views of the published tensors where those were fp32."""


def convert(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    heads: int | None = None,
    stage: Stage | None = None,
    halting: Halting = "off",
    halting_threshold: float = 0.55,
) -> str:
    """Turns a published checkpoint into a weights folder and returns its fingerprint.

    Args:
        checkpoint: the `.pth` file; its `ema` is taken before its `model`, and a bare state dict is taken as it is.
        folder: replaced when it is a weights folder already.
        heads, stage, halting, halting_threshold: see `from_official`. Without `stage`, the training arguments in the
            file are also asked.

    Raises:
        CheckpointError: the file is none, is cut short, would run code, or has another layout than the published one.
        WeightsError: the folder exists and is something else.
    """
    checkpoint = Path(checkpoint)
    try:
        loaded = _load(checkpoint)
        envelope, state = _unwrap(loaded)
        _require_honest_size(state, checkpoint.stat().st_size)
        if stage is None and not _has_gan(state):
            stage = _stage_of_args(loaded.get("args"))
        config, ours = from_official(
            state, heads=heads, stage=stage, halting=halting, halting_threshold=halting_threshold
        )
        for name, tensor in ours.items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"tensor {_published_name(name, config)!r} holds NaN or infinity")
    except CheckpointError as error:
        raise CheckpointError(f"{str(checkpoint)!r} cannot be converted: {error}") from error.__cause__
    with torch.device("meta"):
        model = Alit(config)
    model.load_state_dict(ours, assign=True)
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = {
        "source": checkpoint.name,
        "source_sha256": digest,
        "source_envelope": envelope,
        "stage": 2 if config.mixing == "soft" else 1,
    }
    return save_weights(folder, model, provenance=provenance)


def from_official(
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    stage: Stage | None = None,
    halting: Halting = "off",
    halting_threshold: float = 0.55,
) -> Converted:
    """Reads the architecture off a published state dict's names and shapes, and renames its tensors to ours.

    Args:
        state: under the published names; keys starting with `gan_losses.` are dropped, every other one must fit.
        heads: attention heads; known for the published presets, to be given for any other width and depth.
        stage: of training; 2 decodes a VQGAN base softly, 1 by the likeliest code. By default 2 where `gan_losses.*`
            is present, else 1.
        halting: off by default, as stage 2 was trained; see `AlitConfig`.
        halting_threshold: of the dynamic halting mask.

    Raises:
        CheckpointError: the first tensor that is missing, of another shape, or unknown; or an impossible architecture.
    """
    if stage is None:
        stage = 2 if _has_gan(state) else 1
    if stage not in (1, 2):
        raise CheckpointError(f"stage must be 1 or 2, got {stage!r}")
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(GAN)}
    config = _config(_Shapes(rest), heads, stage, halting, halting_threshold)
    with torch.device("meta"):
        expected = Alit(config).state_dict()
    ours = {}
    for name, like in expected.items():
        published = _published_name(name, config)
        shape = tuple(like.shape)
        for pattern, with_axes in _EXTRA_AXES:
            shape = with_axes(shape) if pattern.search(published) else shape
        if published not in rest:
            raise CheckpointError(f"tensor {published!r} is missing; expected the shape {shape}")
        tensor = rest.pop(published)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"tensor {published!r} has the shape {tuple(tensor.shape)}, expected {shape}")
        ours[name] = tensor.detach().float().reshape(like.shape)
    if rest:
        raise CheckpointError(f"tensor {min(rest)!r} has no place in the published layout")
    return Converted(config, ours)


def _published_name(name: str, config: AlitConfig) -> str:
    for pattern, published in _RENAMES:
        name = pattern.sub(published, name)
    return re.sub(r"\.up\.-(\d+)", lambda match: f".up.{len(config.base.channels) - 1 - int(match[1])}", name)


# -------------------------------------------------------------------- shapes to config


class _Shapes:
    """The shapes of a state dict, asked for one by one."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def of(self, name: str, axes: int) -> tuple[int, ...]:
        if name not in self.state:
            raise CheckpointError(f"tensor {name!r} is missing")
        shape = tuple(self.state[name].shape)
        if len(shape) != axes:
            raise CheckpointError(f"tensor {name!r} has the shape {shape}, expected {axes} axes")
        return shape

    def count(self, prefix: str) -> int:
        """One more than the highest index that follows `prefix`."""
        pattern = re.compile(re.escape(prefix) + r"(\d{1,4})\.")
        return 1 + max((int(match[1]) for match in map(pattern.match, self.state) if match), default=-1)


def _config(shapes: _Shapes, heads: int | None, stage: Stage, halting: Halting, halting_threshold: float) -> AlitConfig:
    base = _base(shapes)
    width = shapes.of("encoder_class_embedding", 2)[1]
    depth = max(shapes.count("encoder.transformer."), shapes.count("decoder.transformer."))
    heads = heads or PUBLISHED_HEADS.get((width, depth))
    if heads is None:
        raise CheckpointError(
            f"width {width} with {depth} blocks is no published preset, and the number of attention heads cannot be "
            f"read off the tensors; give it as heads=N"
        )
    rows = shapes.of("encoder_positional_embedding", 2)[0]
    grid = math.isqrt(max(rows - 1, 0))
    if grid**2 != rows - 1 or not grid:
        raise CheckpointError(
            f"tensor 'encoder_positional_embedding' has {rows} rows, expected one more than a square number"
        )
    codebook = "quantize.embedding.weight"
    try:
        return AlitConfig(
            base=base,
            image_size=grid * base.patch_size,
            width=width,
            depth=depth,
            heads=heads,
            latents_per_iteration=shapes.of("latent_tokens", 2)[0],
            iterations=shapes.of("timestep_embedding", 3)[0],
            code_dim=shapes.of("pre_quantizer_mlp.weight", 2)[0],
            codebook_size=shapes.of(codebook, 2)[0] if codebook in shapes.state else None,
            mixing="soft" if stage == 2 else "hard",
            halting=halting,
            halting_threshold=halting_threshold,
        )
    except ConfigError as error:
        raise CheckpointError(f"its shapes and the arguments make no model: {error}") from error


def _base(shapes: _Shapes) -> VQGANConfig | KLConfig:
    found = [prefix for prefix in (VQGAN_PREFIX, KL_PREFIX) if any(name.startswith(prefix) for name in shapes.state)]
    if len(found) != 1:
        raise CheckpointError(
            f"it must hold either {VQGAN_PREFIX}* or {KL_PREFIX}* tensors, it has {'both' if found else 'neither'}; "
            f"a base tokenizer's own file (vqgan.ckpt, vae.ckpt) is not an ALIT checkpoint"
        )
    (prefix,) = found
    levels = shapes.count(f"{prefix}encoder.down.")
    channels = tuple(shapes.of(f"{prefix}encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels))
    blocks = shapes.count(f"{prefix}encoder.down.0.block.")
    try:
        if prefix == KL_PREFIX:
            latent_dim = shapes.of(f"{prefix}post_quant_conv.weight", 4)[0]
            return KLConfig(channels=channels, blocks=blocks, latent_dim=latent_dim)
        codebook_size, latent_dim = shapes.of(f"{prefix}quantize.embedding.weight", 2)
        return VQGANConfig(
            channels=channels,
            blocks=blocks,
            latent_dim=latent_dim,
            codebook_size=codebook_size,
            published_shortcut=True,
        )
    except ConfigError as error:
        raise CheckpointError(f"its base tokenizer's shapes make no model: {error}") from error


# -------------------------------------------------------------------- the file


def _load(path: Path) -> dict[Any, Any]:
    """The pickled dictionary, its tensors mapped from the file rather than read."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error.strerror})") from error
    if start != b"PK\x03\x04":
        raise CheckpointError(
            f"it is not a checkpoint: what torch.save writes (since PyTorch 1.6) begins with b'PK', this file with "
            f"{start!r}; check the download"
        )
    with safe_globals([argparse.Namespace]):
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            names = ", ".join(_forbidden(path)) or "something that torch.load(weights_only=True) refuses"
            raise CheckpointError(
                f"its pickle asks for {names}, and loading that could run code; nothing was run. If you trust its "
                f"author, save its 'ema' state dict alone to a new file and convert that"
            ) from error
        except Exception as error:  # a damaged file can make the reader fail in any way
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"it is cut short or damaged ({type(error).__name__}: {reason}); download it again"
            ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"it holds a {type(loaded).__name__}, expected a dictionary; {_ENVELOPES}")
    return loaded


def _forbidden(path: Path) -> Iterator[str]:
    """The globals that a refused pickle names, for the message alone."""
    try:
        yield from sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the pickle is refused already, and may defeat this reader too
        return


_ENVELOPES = "a published checkpoint holds a state dict under 'ema' or 'model', or is one itself"


def _unwrap(loaded: dict[Any, Any]) -> tuple[str, dict[str, Tensor]]:
    """The state dict, and the name of the part of the file that it is."""
    for envelope in ("ema", "model"):
        if isinstance(loaded.get(envelope), dict):
            state = loaded[envelope]
            break
    else:
        envelope, state = "none", loaded
        if not any(isinstance(value, Tensor) for value in loaded.values()):
            raise CheckpointError(f"it has the keys {sorted(map(str, loaded))[:10]}; {_ENVELOPES}")
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


def _require_honest_size(state: dict[str, Tensor], size: int) -> None:
    """Refuses tensors that repeat a small storage (stride 0): copying them could take unbounded memory."""
    claimed = sum(tensor.nbytes for name, tensor in state.items() if not name.startswith(GAN))
    if claimed > size:
        raise CheckpointError(f"its tensors claim {claimed} bytes, but the file has only {size}; it is not as saved")


def _has_gan(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(GAN) for name in state)


def _stage_of_args(args: object) -> Stage | None:
    """The training stage, where the saved command line names it."""
    if isinstance(args, argparse.Namespace):
        for told in (vars(args).get("train_stage"), vars(args).get("output_dir")):
            for name, stage in STAGES.items():
                if isinstance(told, str) and name in told:
                    return stage
    return None
