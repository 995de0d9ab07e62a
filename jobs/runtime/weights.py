"""Weights from any storage to the driver, and from there into memory that the workers of a machine share."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alit.model.config import AlitConfig
from alit.tokenizer import Alit
from alit.weights import CONFIG, MODEL, Weights, load_weights
from jobs.storage.path import parse_uri
from jobs.storage.retry import StorageError


def load(uri: str | None) -> Weights:
    """Loads a weights folder from any storage that `parse_uri` supports.

    Args:
        uri: A local path or a URI; None for the packaged weights.

    Raises:
        WeightsError: The folder does not hold weights.
        StorageError: The folder cannot be read.
    """
    if uri is None or "://" not in uri:
        return load_weights(uri)
    folder = parse_uri(uri)
    with tempfile.TemporaryDirectory(prefix="alit-weights-") as copy:
        for name in (CONFIG, MODEL):
            try:
                (Path(copy) / name).write_bytes((folder / name).read())
            except OSError as error:
                raise StorageError(f"no weights in {uri!r}: {name} cannot be read ({error})") from error
        return load_weights(copy)  # memory-mapped tensors stay valid after the files are unlinked


@dataclass(frozen=True, slots=True)
class SharedModel:
    """A model in Ray's object store; all workers of a machine map the same copy of its parameters.

    Attributes:
        config: The model's configuration.
        state: Reference to its parameters, NumPy arrays by name.
    """

    config: AlitConfig
    state: Any

    @staticmethod
    def put(model: Alit) -> SharedModel:
        """Puts a model's parameters into the object store."""
        import ray

        state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        return SharedModel(model.config, ray.put(state))

    def get(self) -> Alit:
        """Returns the model in eval mode; its parameters are read-only, so it cannot be trained."""
        import ray

        with torch.device("meta"):
            model = Alit(self.config)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            arrays: Any = ray.get(self.state)
            state = {name: torch.from_numpy(array) for name, array in arrays.items()}
        model.load_state_dict(state, assign=True)
        model.reset_buffers()
        return model.eval().requires_grad_(False)
