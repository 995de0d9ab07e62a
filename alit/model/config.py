"""Model configuration: frozen dataclasses, with conversion from and to JSON.

A weights folder's `config.json` holds one `AlitConfig` (plus provenance, see `alit.weights`). Every value is checked
when the object is created, so that a wrong file fails with a sentence before any tensor is allocated.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from alit.errors import ConfigError
from alit.validation import require, require_integer

Halting = Literal["off", "deterministic", "sampled"]
CodeMixing = Literal["soft", "hard"]

MAX_IMAGE_SIZE = 4096  # a config is untrusted input: it must not be able to ask for unbounded memory
MAX_CODEBOOK = 65536  # ids are stored as uint16

_require = partial(require, error=ConfigError)
_require_int = partial(require_integer, error=ConfigError)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require_channels(channels: tuple[int, ...], groups: int) -> None:
    _require_int("norm_groups", groups, 1, 4096)
    _require(
        isinstance(channels, tuple) and 1 <= len(channels) <= 8,
        f"channels must list 1 to 8 levels, finest first, got {channels!r}",
    )
    for width in channels:
        _require_int("each entry of channels", width, 1, 4096)
        _require(width % groups == 0, f"each entry of channels must be a multiple of norm_groups={groups}, got {width}")


@dataclass(frozen=True, kw_only=True, slots=True)
class VQGANConfig:
    """A convolutional autoencoder with a discrete bottleneck, in the style of MaskGIT's VQGAN.

    Attributes:
        kind: Identifies the class in JSON.
        channels: The width of each resolution level, finest first; every level but the last halves the resolution.
        blocks: The number of residual blocks per level.
        latent_dim: The width of a base token.
        codebook_size: The number of base codes.
        norm_groups: The number of groups of every group norm. It must be small where channels are few: a group of one
            channel loses the brightness of its image.
        published_shortcut: Where a residual block changes its width, feed the 1x1 shortcut with the block's own output
            instead of its input, as in the published MaskGIT weights. Off for models trained with this library.
    """

    kind: Literal["vqgan"] = "vqgan"
    channels: tuple[int, ...]
    blocks: int = 2
    latent_dim: int = 256
    codebook_size: int = 1024
    norm_groups: int = 32
    published_shortcut: bool = False

    def __post_init__(self) -> None:
        _require_channels(self.channels, self.norm_groups)
        _require_int("blocks", self.blocks, 1, 16)
        _require_int("latent_dim", self.latent_dim, 1, 4096)
        _require_int("base codebook_size", self.codebook_size, 2, MAX_CODEBOOK)
        _require(
            isinstance(self.published_shortcut, bool),
            f"published_shortcut must be true or false, got {self.published_shortcut!r}",
        )

    @property
    def patch_size(self) -> int:
        """The number of pixels per base token along one side."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class KLConfig:
    """The latent-diffusion KL autoencoder.

    Attributes:
        kind: Identifies the class in JSON.
        channels: The width of each resolution level, finest first; every level but the last halves the resolution.
        blocks: The number of residual blocks per level.
        latent_dim: The width of a base token.
        latent_scale: The base token is the posterior's mean times this factor.
    """

    kind: Literal["kl"] = "kl"
    channels: tuple[int, ...]
    blocks: int = 2
    latent_dim: int = 16
    latent_scale: float = 0.2325

    def __post_init__(self) -> None:
        _require_channels(self.channels, 32)
        _require_int("blocks", self.blocks, 1, 16)
        _require_int("latent_dim", self.latent_dim, 1, 4096)
        _require(
            _is_number(self.latent_scale) and 0 < self.latent_scale < math.inf,
            f"latent_scale must be a number above 0, got {self.latent_scale!r}",
        )

    @property
    def patch_size(self) -> int:
        """The number of pixels per base token along one side."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class AlitConfig:
    """The tokenizer: a 2D base tokenizer and the recurrent latent distillation on top of it.

    Attributes:
        base: The 2D base tokenizer.
        image_size: The side of the square input in pixels.
        width: The width of the transformers that form encoder and decoder.
        depth: The number of blocks of each of them.
        heads: The number of attention heads of each of them.
        latents_per_iteration: The number of 1D latents that each rollout iteration adds.
        iterations: The maximum number of rollout iterations.
        code_dim: The width of the factorized latent code.
        codebook_size: The number of latent codes; None for continuous codes, which have no ids.
        mixing: The conversion of predicted base logits to base latents: "soft" (softmax-weighted mean of the base
            codebook) or "hard" (the most likely code). Without effect for a continuous base.
        halting: Base tokens that are predicted with a probability of at least `halting_threshold` are masked in later
            iterations. "sampled" masks them with that probability, by noise that depends on `halting_seed`, iteration
            and position alone, so that an image's tokens do not depend on its batch.
        halting_threshold: The probability at which base tokens halt, 0 to 1.
        halting_seed: The seed of the noise of sampled halting.
        criterion: The default token-selection criterion, as `alit.encoding.criteria.parse` reads it.
    """

    base: VQGANConfig | KLConfig
    image_size: int
    width: int
    depth: int
    heads: int
    latents_per_iteration: int = 32
    iterations: int = 8
    code_dim: int = 12
    codebook_size: int | None = 4096
    mixing: CodeMixing = "soft"
    halting: Halting = "off"
    halting_threshold: float = 0.55
    halting_seed: int = 0
    criterion: str = "l1:0.07"

    def __post_init__(self) -> None:
        patch = self.base.patch_size
        _require_int("image_size", self.image_size, patch, MAX_IMAGE_SIZE)
        _require(self.image_size % patch == 0, f"image_size must be a multiple of {patch}, got {self.image_size}")
        _require_int("width", self.width, 1, 16384)
        _require_int("depth", self.depth, 1, 128)
        _require_int("heads", self.heads, 1, 256)
        _require(self.width % self.heads == 0, f"width must be a multiple of heads={self.heads}, got {self.width}")
        _require(
            self.width > self.base.latent_dim,
            f"width must exceed the base's latent_dim={self.base.latent_dim}, got {self.width}",
        )
        _require_int("latents_per_iteration", self.latents_per_iteration, 1, 4096)
        _require_int("iterations", self.iterations, 1, 256)
        _require_int("tokens at most", self.max_tokens, 1, 65535)
        _require_int("code_dim", self.code_dim, 1, 4096)
        if self.codebook_size is not None:
            _require_int("codebook_size", self.codebook_size, 2, MAX_CODEBOOK)
        _require(self.mixing in get_args(CodeMixing), f"mixing must be soft or hard, got {self.mixing!r}")
        _require(
            self.halting in get_args(Halting), f"halting must be off, deterministic or sampled, got {self.halting!r}"
        )
        _require(
            self.halting == "off" or isinstance(self.base, VQGANConfig),
            f"halting={self.halting!r} needs a discrete base; with a KL base it must be off",
        )
        _require(
            _is_number(self.halting_threshold) and 0 <= self.halting_threshold <= 1,
            f"halting_threshold must lie in [0, 1], got {self.halting_threshold!r}",
        )
        _require_int("halting_seed", self.halting_seed, 0, 2**63 - 1)
        _require(isinstance(self.criterion, str), f"criterion must be text such as 'l1:0.07', got {self.criterion!r}")

    @property
    def grid(self) -> int:
        """The number of base tokens along one side."""
        return self.image_size // self.base.patch_size

    @property
    def max_tokens(self) -> int:
        """The longest code, in tokens."""
        return self.latents_per_iteration * self.iterations

    @property
    def lengths(self) -> tuple[int, ...]:
        """Every number of tokens that the model can give, in ascending order."""
        return tuple(self.latents_per_iteration * k for k in range(1, self.iterations + 1))

    def to_json(self) -> dict[str, Any]:
        """Returns a plain dictionary that `from_json` converts back to an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AlitConfig:
        """Creates a config from the output of `to_json`.

        Raises:
            ConfigError: A field is unknown, missing or impossible; the message names it with its value.
        """
        _require(isinstance(data, dict), f"a model config must be an object, got {data!r}")
        base_fields = data.get("base")
        _require(isinstance(base_fields, dict), f"config field 'base' must be an object, got {base_fields!r}")
        base: dict[str, Any] = dict(base_fields or {})
        kinds = {"vqgan": VQGANConfig, "kl": KLConfig}
        _require(base.get("kind") in list(kinds), f"base kind must be one of {sorted(kinds)}, got {base.get('kind')!r}")
        if isinstance(base.get("channels"), list):
            base["channels"] = tuple(base["channels"])
        fields = data | {"base": _build(kinds[base["kind"]], base)}
        return _build(cls, fields)


def _build(kind: type, fields: dict[str, Any]) -> Any:
    """Creates `kind` from `fields`; a wrong set of names or types raises one sentence."""
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(fields) - known)
    _require(not unknown, f"config has unknown field {unknown[0] if unknown else ''!r}; known: {sorted(known)}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise ConfigError(f"config does not fit {kind.__name__}: {error}") from error
