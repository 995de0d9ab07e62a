"""Configurations are checked when they are created, and survive JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TINY, through_json

from alit.errors import ConfigError
from alit.model.config import AlitConfig, KLConfig

KL = dataclasses.replace(TINY, base=KLConfig(channels=(32, 32), blocks=1, latent_dim=8))


@st.composite
def bases(draw) -> dict:
    """Draws possible bases in their JSON form."""
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
    """Draws possible configs in their JSON form. The test makes objects of them: type checks use `random`, which
    hypothesis does not allow in strategies.
    """
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
    """Any possible config is read from its JSON as it was, and its sizes agree."""
    config = AlitConfig.from_json(data)
    assert json.loads(json.dumps(config.to_json())) == data
    assert through_json(config) == config
    assert config.grid * config.base.patch_size == config.image_size
    assert config.lengths[-1] == config.max_tokens
    assert len(config.lengths) == config.iterations


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
    """Returns the message with which a config is refused."""
    with pytest.raises(ConfigError) as error:
        AlitConfig.from_json(data)
    return str(error.value)


@pytest.mark.unchecked
@pytest.mark.parametrize("name", WRONG)
def test_config_refuses_wrong_values(name):
    """A field that is unknown, of another type or out of range is refused with its value."""
    changes, expected = WRONG[name]
    assert expected in sentence(TINY.to_json() | changes)


@pytest.mark.unchecked
@pytest.mark.parametrize("name", WRONG_BASE)
def test_config_refuses_wrong_values_of_a_base(name):
    """A wrong field of a discrete base is refused with its value."""
    changes, expected = WRONG_BASE[name]
    data = TINY.to_json()
    assert expected in sentence(data | {"base": data["base"] | changes})


@pytest.mark.unchecked
@pytest.mark.parametrize("name", WRONG_KL)
def test_config_refuses_wrong_values_of_a_kl_base(name):
    """A wrong field of a continuous base is refused with its value."""
    changes, expected = WRONG_KL[name]
    data = KL.to_json()
    assert expected in sentence(data | {"base": data["base"] | changes})


@pytest.mark.parametrize("field", ["base", "image_size", "width", "depth", "heads"])
def test_config_names_missing_fields(field):
    """A required field that is missing is named."""
    data = TINY.to_json()
    del data[field]
    assert repr(field) in sentence(data)


def test_config_names_missing_fields_of_the_base():
    """A required field of the base that is missing is named."""
    data = TINY.to_json()
    del data["base"]["channels"]
    assert "'channels'" in sentence(data)


@pytest.mark.unchecked
@pytest.mark.parametrize("data", [[], "tiny", 5, None])
def test_config_refuses_other_types(data):
    """A config that is no object is refused with its value."""
    assert repr(data) in sentence(data)


@pytest.mark.unchecked
@pytest.mark.parametrize("base", ["vqgan", 5, None, []])
def test_config_refuses_other_types_of_base(base):
    """A base that is no object is refused with its value."""
    assert f"config field 'base' must be an object, got {base!r}" in sentence(TINY.to_json() | {"base": base})


@pytest.mark.parametrize("halting", ["deterministic", "sampled"])
def test_halting_needs_a_discrete_base(halting):
    """Halting with a continuous base is refused."""
    with pytest.raises(ConfigError, match=f"halting='{halting}' needs a discrete base"):
        dataclasses.replace(KL, halting=halting)


def test_config_cannot_be_changed():
    """Fields of a config cannot be assigned after it was checked."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.width = 5
