"""Communication between the workers of a training step; with one process, every function is the identity.

Training is written for one worker that has the whole batch. Where several workers have a share each, sums over the
batch use these functions, so that the result is the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


def workers() -> int:
    """Returns the number of workers."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns the rank of this worker, from 0."""
    return dist.get_rank() if workers() > 1 else 0


def summed(x: Tensor) -> Tensor:
    """Returns the sum over workers, without gradient."""
    x = x.detach().clone()
    if workers() > 1:
        dist.all_reduce(x)
    return x


def averaged(x: Tensor) -> Tensor:
    """Returns the mean over workers, without gradient."""
    return summed(x) / workers()


def gathered(x: Tensor) -> Tensor:
    """Returns the rows of all workers, in the order of their ranks, without gradient."""
    x = x.detach().contiguous()
    if workers() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(workers())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def gathered_objects(item: Any) -> list[Any]:
    """Returns one small picklable object of each worker, in the order of their ranks."""
    if workers() == 1:
        return [item]
    items: list[Any] = [None] * workers()
    dist.all_gather_object(items, item)
    return items


def own_rows(x: Tensor, dim: int = 0) -> Tensor:
    """Returns this worker's share of a tensor of the whole batch, divided along `dim`."""
    return x.tensor_split(workers(), dim)[rank()]


def whole(x: Tensor) -> Tensor:
    """Returns a tensor unsharded; every worker must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def sharded_like(x: Tensor, example: Tensor) -> Tensor:
    """Returns an unsharded tensor with the sharding of `example`."""
    if not isinstance(example, DTensor):
        return x
    return distribute_tensor(x.to(example.device), example.device_mesh, example.placements)


def on_cpu(tree: Any) -> Any:
    """Returns a nested state with every tensor unsharded and on the CPU; every worker must call it."""
    return tree_map(lambda leaf: whole(leaf).detach().cpu() if isinstance(leaf, Tensor) else leaf, tree)
