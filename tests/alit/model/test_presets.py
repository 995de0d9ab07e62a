"""The presets have the published sizes."""

from __future__ import annotations

import pytest
import torch
from small_models import through_json

from alit.errors import ConfigError
from alit.model.codebook import LatentCodebook
from alit.model.config import VQGANConfig
from alit.model.distillation import LatentDecoder, LatentEncoder
from alit.model.presets import PRESETS, nano
from alit.tokenizer import build_base

PUBLISHED = ("tiny", "small", "base", "semilarge")
# design/STATE_DICT.md, section 6: parameters without the base, quantized latents and continuous ones
CORE = {
    ("vqgan", "tiny"): (52_837_132, 52_787_980),
    ("vqgan", "small"): (207_532_812, 207_483_660),
    ("vqgan", "base"): (174_173_964, 174_124_812),
    ("vqgan", "semilarge"): (409_072_396, 409_023_244),
    ("kl", "tiny"): (51_988_492, 51_939_340),
    ("kl", "small"): (205_651_980, 205_602_828),
    ("kl", "base"): (172_809_228, 172_760_076),
    ("kl", "semilarge"): (407_191_564, 407_142_412),
}


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("base", ["vqgan", "kl"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets_survive_json(name, base, quantized):
    """Every published preset, of either base and with either kind of latents, is read from its JSON as it was."""
    config = PRESETS[name](base=base, quantized=quantized)
    assert through_json(config) == config


def test_packaged_preset_survives_json():
    """The preset of the packaged weights is read from its JSON as it was."""
    assert through_json(nano()) == nano()


def test_presets_refuse_unknown_bases():
    """A preset with an unknown base is refused with the known ones."""
    with pytest.raises(ConfigError, match="base must be vqgan or kl, got 'dct'"):
        PRESETS["tiny"](base="dct")


def parameters(module: torch.nn.Module) -> int:
    """Returns the number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("base", "name"), CORE)
def test_presets_have_the_published_parameter_counts(base, name):
    """Encoder, decoder and codebook have the published numbers of parameters."""
    for quantized, core in zip((True, False), CORE[base, name], strict=True):
        config = PRESETS[name](base=base, quantized=quantized)
        outputs = config.base.codebook_size if isinstance(config.base, VQGANConfig) else config.base.latent_dim
        with torch.device("meta"):
            found = parameters(LatentEncoder(config)) + parameters(LatentDecoder(config, outputs))
            if config.codebook_size is not None:
                found += parameters(LatentCodebook(config.codebook_size, config.code_dim))
        assert found == core


def test_published_base_has_its_parameter_count():
    """The published base has its number of parameters."""
    with torch.device("meta"):
        assert parameters(build_base(PRESETS["tiny"]().base)) == 54_515_587


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets_give_32_to_256_tokens(name):
    """Published presets give 32 to 256 tokens to an image of 256 pixels."""
    config = PRESETS[name]()
    assert (config.image_size, config.grid) == (256, 16)
    assert config.lengths == (32, 64, 96, 128, 160, 192, 224, 256)


def test_packaged_preset_gives_16_to_64_tokens():
    """The packaged preset gives 16 to 64 tokens to an image of 64 pixels."""
    assert (nano().image_size, nano().grid, nano().lengths) == (64, 8, (16, 32, 48, 64))
