"""Attention of latents to base tokens."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from lively_models import CONFIGS, images, images_u8, lively
from small_models import TINY
from torch import Tensor

from alit.tokenizer import Alit

pytestmark = pytest.mark.numeric


@cache
def deep_model(name: str) -> Alit:
    """Returns a model with two blocks, whose attention is averaged."""
    return lively(dataclasses.replace(CONFIGS[name], depth=2))


@pytest.mark.parametrize("model_name", CONFIGS)
def test_attention_maps_sum_to_one_over_base_grid(model_name):
    """The attention map of each token is nonnegative and sums to one over the base grid."""
    maps = deep_model(model_name).attention_maps(images_u8())
    assert [tuple(m.shape) for m in maps] == [(7, n, 8, 8) for n in TINY.lengths]
    for m in maps:
        assert (m >= 0).all()
        torch.testing.assert_close(m.sum((2, 3)), torch.ones(m.shape[:2]).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("model_name", ["quantized", "deterministic", "sampled"])
def test_attention_maps_follow_the_same_rollout(model_name, monkeypatch):
    """`attention_maps` computes the same latents as `rollout`."""
    model, seen = deep_model(model_name), []
    expected = [step.latents_BND for step in model.rollout(images())]
    attend = model.encoder.attention

    def watched(x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        out = attend(x_BSD)
        seen.append(model.encoder.latents(out[0]))
        return out

    monkeypatch.setattr(model.encoder, "attention", watched)
    model.attention_maps(images())
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
