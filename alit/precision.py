"""Precision of computations: without autocast, and in float32 at least."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Returns a context without autocast on the device of `x`: the nearest of many codes must be found in fp32."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def upcast(x: Tensor) -> Tensor:
    """Returns a tensor in float32, or in float64 if it has that precision already."""
    return x if x.dtype == torch.float64 else x.float()
