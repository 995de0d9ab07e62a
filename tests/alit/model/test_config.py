"""Configurations are checked when they are made, survive JSON, and the presets have the published sizes."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TINY

from alit.errors import ConfigError
from alit.model.codebook import LatentCodebook
from alit.model.config import AlitConfig, KLConfig, VQGANConfig
from alit.model.distillation import LatentDecoder, LatentEncoder
from alit.model.presets import PRESETS, nano
from alit.tokenizer import build_base

PUBLISHED = ("tiny", "small", "base", "semilarge")
KL = dataclasses.replace(TINY, base=KLConfig(channels=(32, 32), blocks=1, latent_dim=8))

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


def through_json(config: AlitConfig) -> AlitConfig:
    return AlitConfig.from_json(json.loads(json.dumps(config.to_json())))


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("base", ["vqgan", "kl"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_config_published_presets_survive_json(name, base, quantized):
    """Published presets survive JSON."""
    config = PRESETS[name](base=base, quantized=quantized)
    assert through_json(config) == config


def test_config_packaged_preset_survives_json():
    """The packaged preset survives JSON."""
    assert through_json(nano()) == nano()


@st.composite
def bases(draw) -> dict:
    base = {"blocks": draw(st.integers(1, 16)), "latent_dim": draw(st.integers(1, 64))}
    widths = draw(st.lists(st.integers(1, 64), min_size=1, max_size=8))
    if draw(st.booleans()):
        scale = draw(st.floats(1e-6, 1e6))
        return base | {"kind": "kl", "channels": [32 * w for w in widths], "latent_scale": scale}
    groups = draw(st.sampled_from([1, 2, 4]))
    return base | {
        "kind": "vqgan",
        "channels": [groups * w for w in widths],
        "codebook_size": draw(st.integers(2, 65536)),
        "norm_groups": groups,
        "published_shortcut": draw(st.booleans()),
    }


@st.composite
def configs(draw) -> dict:
    """Possible configs in their JSON form (made into objects in the test: type checks inside strategies are not for
    hypothesis, for they use `random`)."""
    base, heads = draw(bases()), draw(st.integers(1, 16))
    patch = 2 ** (len(base["channels"]) - 1)
    return {
        "base": base,
        "image_size": patch * draw(st.integers(1, 4096 // patch)),
        "width": heads * (base["latent_dim"] // heads + draw(st.integers(1, 8))),
        "depth": draw(st.integers(1, 128)),
        "heads": heads,
        "latents_per_iteration": draw(st.integers(1, 255)),
        "iterations": draw(st.integers(1, 256)),
        "code_dim": draw(st.integers(1, 4096)),
        "codebook_size": draw(st.none() | st.integers(2, 65536)),
        "mixing": draw(st.sampled_from(["soft", "hard"])),
        "halting": draw(st.sampled_from(["off", "deterministic", "sampled"])) if base["kind"] == "vqgan" else "off",
        "halting_threshold": draw(st.floats(0, 1)),
        "halting_seed": draw(st.integers(0, 2**63 - 1)),
        "criterion": draw(st.text(max_size=20)),
    }


@settings(max_examples=60, deadline=None)
@given(configs())
def test_config_survives_json(data):
    """Every config survives JSON."""
    config = AlitConfig.from_json(data)
    assert json.loads(json.dumps(config.to_json())) == data
    assert through_json(config) == config
    assert config.grid * config.base.patch_size == config.image_size
    assert config.lengths[-1] == config.max_tokens
    assert len(config.lengths) == config.iterations


# ---------------------------------------------------------------- what cannot be

WRONG = {
    "image size no multiple": ({"image_size": 17}, "image_size must be a multiple of 2, got 17"),
    "image size below a patch": ({"image_size": 1}, "image_size must be a whole number from 2 to 4096, got 1"),
    "image size enormous": ({"image_size": 1 << 20}, "got 1048576"),
    "width at most the base's": ({"width": 8}, "width must exceed the base's latent_dim=8, got 8"),
    "width no multiple of heads": ({"heads": 3}, "width must be a multiple of heads=3, got 32"),
    "no heads": ({"heads": 0}, "heads must be a whole number from 1 to 256, got 0"),
    "no depth": ({"depth": 0}, "depth must be a whole number from 1 to 128, got 0"),
    "depth a truth": ({"depth": True}, "depth must be a whole number from 1 to 128, got True"),
    "no latents": ({"latents_per_iteration": 0}, "latents_per_iteration must be a whole number from 1 to 4096, got 0"),
    "no iterations": ({"iterations": -1}, "iterations must be a whole number from 1 to 256, got -1"),
    "too many tokens": ({"latents_per_iteration": 4096, "iterations": 16}, "from 1 to 65535, got 65536"),
    "no code width": ({"code_dim": 0}, "code_dim must be a whole number from 1 to 4096, got 0"),
    "one code": ({"codebook_size": 1}, "codebook_size must be a whole number from 2 to 65536, got 1"),
    "ids beyond uint16": ({"codebook_size": 65537}, "codebook_size must be a whole number from 2 to 65536, got 65537"),
    "unknown mixing": ({"mixing": "medium"}, "mixing must be soft or hard, got 'medium'"),
    "unknown halting": ({"halting": "never"}, "halting must be off, deterministic or sampled, got 'never'"),
    "threshold above 1": ({"halting_threshold": 1.5}, "halting_threshold must lie in [0, 1], got 1.5"),
    "threshold not a number": ({"halting_threshold": float("nan")}, "halting_threshold must lie in [0, 1], got nan"),
    "negative seed": (
        {"halting_seed": -1},
        "halting_seed must be a whole number from 0 to 9223372036854775807, got -1",
    ),
    "size as text": ({"image_size": "16"}, "image_size must be a whole number from 2 to 4096, got '16'"),
    "size as fraction": ({"image_size": 16.0}, "image_size must be a whole number from 2 to 4096, got 16.0"),
    "threshold as text": ({"halting_threshold": "half"}, "halting_threshold must lie in [0, 1], got 'half'"),
    "criterion no text": ({"criterion": 5}, "criterion must be text such as 'l1:0.07', got 5"),
    "unknown field": ({"colour": "red"}, "unknown field 'colour'"),
}
WRONG_BASE = {
    "no level": ({"channels": []}, "channels must list 1 to 8 levels, finest first, got ()"),
    "nine levels": ({"channels": [4] * 9}, "channels must list 1 to 8 levels"),
    "channels as number": ({"channels": 8}, "channels must list 1 to 8 levels, finest first, got 8"),
    "channel as text": ({"channels": ["8"]}, "each entry of channels must be a whole number from 1 to 4096, got '8'"),
    "channels no multiple": ({"channels": [8, 18]}, "must be a multiple of norm_groups=4, got 18"),
    "no groups": ({"norm_groups": 0}, "norm_groups must be a whole number from 1 to 4096, got 0"),
    "no blocks": ({"blocks": 0}, "blocks must be a whole number from 1 to 16, got 0"),
    "no latent width": ({"latent_dim": 0}, "latent_dim must be a whole number from 1 to 4096, got 0"),
    "one base code": ({"codebook_size": 1}, "base codebook_size must be a whole number from 2 to 65536, got 1"),
    "shortcut as text": ({"published_shortcut": "no"}, "published_shortcut must be true or false, got 'no'"),
    "unknown kind": ({"kind": "dct"}, "base kind must be one of ['kl', 'vqgan'], got 'dct'"),
    "kind a list": ({"kind": []}, "base kind must be one of ['kl', 'vqgan'], got []"),
    "unknown base field": ({"dropout": 0.1}, "unknown field 'dropout'"),
}
WRONG_KL = {
    "scale of zero": ({"latent_scale": 0}, "latent_scale must be a number above 0, got 0"),
    "scale not a number": ({"latent_scale": float("nan")}, "latent_scale must be a number above 0, got nan"),
    "scale without end": ({"latent_scale": float("inf")}, "latent_scale must be a number above 0, got inf"),
    "scale as text": ({"latent_scale": "0.2"}, "latent_scale must be a number above 0, got '0.2'"),
    "channels no multiple of 32": ({"channels": [32, 48]}, "must be a multiple of norm_groups=32, got 48"),
    "a discrete base's field": ({"codebook_size": 32}, "unknown field 'codebook_size'"),
}


def sentence(data: object) -> str:
    with pytest.raises(ConfigError) as error:
        AlitConfig.from_json(data)
    return str(error.value)


@pytest.mark.unchecked
@pytest.mark.parametrize("name", WRONG)
def test_config_wrong_value_is_refused_and_quoted(name):
    """A wrong value is refused and quoted."""
    changes, expected = WRONG[name]
    assert expected in sentence(TINY.to_json() | changes)


@pytest.mark.unchecked
@pytest.mark.parametrize("name", WRONG_BASE)
def test_config_wrong_value_of_the_base_is_refused_and_quoted(name):
    """A wrong value of the base is refused and quoted."""
    changes, expected = WRONG_BASE[name]
    data = TINY.to_json()
    assert expected in sentence(data | {"base": data["base"] | changes})


@pytest.mark.unchecked
@pytest.mark.parametrize("name", WRONG_KL)
def test_config_refuses_wrong_values_of_a_continuous_base(name):
    """A wrong value of a continuous base is refused and quoted."""
    changes, expected = WRONG_KL[name]
    data = KL.to_json()
    assert expected in sentence(data | {"base": data["base"] | changes})


@pytest.mark.parametrize("field", ["base", "image_size", "width", "depth", "heads"])
def test_config_missing_field_is_named(field):
    """A missing field is named."""
    data = TINY.to_json()
    del data[field]
    assert repr(field) in sentence(data)


def test_config_missing_field_of_the_base_is_named():
    """A missing field of the base is named."""
    data = TINY.to_json()
    del data["base"]["channels"]
    assert "'channels'" in sentence(data)


@pytest.mark.unchecked
@pytest.mark.parametrize("data", [[], "tiny", 5, None])
def test_config_that_is_no_object_is_refused_and_quoted(data):
    """A config that is no object is refused and quoted."""
    assert repr(data) in sentence(data)


@pytest.mark.unchecked
@pytest.mark.parametrize("base", ["vqgan", 5, None, []])
def test_config_base_that_is_no_object_is_refused_and_quoted(base):
    """A base that is no object is refused and quoted."""
    assert f"config field 'base' must be an object, got {base!r}" in sentence(TINY.to_json() | {"base": base})


@pytest.mark.parametrize("halting", ["deterministic", "sampled"])
def test_config_halting_needs_a_discrete_base(halting):
    """Halting needs a discrete base."""
    with pytest.raises(ConfigError, match=f"halting='{halting}' needs a discrete base"):
        dataclasses.replace(KL, halting=halting)


def test_config_preset_of_another_base_is_refused():
    """A preset of another base is refused."""
    with pytest.raises(ConfigError, match="base must be vqgan or kl, got 'dct'"):
        PRESETS["tiny"](base="dct")


def test_config_cannot_be_changed_after_it_was_checked():
    """A config cannot be changed after the network was checked."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.width = 5


# ---------------------------------------------------------------- sizes


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("base", "name"), CORE)
def test_config_presets_have_the_published_parameter_counts(base, name):
    """Presets have the published parameter counts."""
    for quantized, core in zip((True, False), CORE[base, name], strict=True):
        config = PRESETS[name](base=base, quantized=quantized)
        outputs = config.base.codebook_size if isinstance(config.base, VQGANConfig) else config.base.latent_dim
        with torch.device("meta"):
            found = parameters(LatentEncoder(config)) + parameters(LatentDecoder(config, outputs))
            if config.codebook_size is not None:
                found += parameters(LatentCodebook(config.codebook_size, config.code_dim))
        assert found == core


def test_config_published_base_has_its_parameter_count():
    """The published base has its parameter count."""
    with torch.device("meta"):
        assert parameters(build_base(PRESETS["tiny"]().base)) == 54_515_587


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_published_give_32_to_256_tokens(name):
    """Published presets give 32 to 256 tokens of 256 pixels."""
    config = PRESETS[name]()
    assert (config.image_size, config.grid) == (256, 16)
    assert config.lengths == (32, 64, 96, 128, 160, 192, 224, 256)


def test_preset_packaged_gives_16_to_64_tokens():
    """The packaged preset gives 16 to 64 tokens of 64 pixels."""
    assert (nano().image_size, nano().grid, nano().lengths) == (64, 8, (16, 32, 48, 64))
