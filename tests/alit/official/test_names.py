"""The published names and shapes of all tensors."""

from __future__ import annotations

import pytest
import torch
from published import (
    BASE_PARAMS,
    COUNTS,
    MINI,
    base_layout,
    core_layout,
    elements,
    golden,
    layout,
    published,
)

from alit.model import presets
from alit.official import from_official
from alit.tokenizer import Alit


@pytest.mark.parametrize("name", MINI)
def test_golden_weights_have_the_published_layout(name):
    """The golden files have the names and shapes of the published checkpoints."""
    assert {key: tuple(tensor.shape) for key, tensor in golden(name).items()} == layout(MINI[name])


@pytest.mark.parametrize(("base", "size", "quantized"), COUNTS)
def test_every_published_size_converts(base, size, quantized):
    """A state dict of every published size gives the config of its preset, and fits its model."""
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
