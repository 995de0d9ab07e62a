"""Quantization of latent codes."""

from __future__ import annotations

import pytest
import torch
from lively_models import images, model_of
from torch import nn

pytestmark = pytest.mark.numeric


def test_rollout_at_strength_zero_keeps_unit_codes():
    """`rollout` at strength zero returns the normalized codes without quantization."""
    for step in model_of("quantized").rollout(images(), strength=0.0):
        unit = nn.functional.normalize(step.unquantized_BNC, dim=-1)
        torch.testing.assert_close(step.codes_BNC, unit)
