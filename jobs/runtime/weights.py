"""Weights on their way: from any storage to the driver, and from there into memory that a machine's workers share."""

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


def load(where: str | None) -> Weights:
    """Loads a weights folder, local or of any storage that `parse_uri` knows; the packaged one when None.

    Raises:
        WeightsError: it does not hold weights.
        StorageError: it cannot be read.
    """
    if where is None or "://" not in where:
        return load_weights(where)
    folder = parse_uri(where)
    with tempfile.TemporaryDirectory(prefix="alit-weights-") as copy:
        for name in (CONFIG, MODEL):
            try:
                (Path(copy) / name).write_bytes((folder / name).read())
            except OSError as error:
                raise StorageError(f"no weights in {where!r}: {name} cannot be read ({error})") from error
        return load_weights(copy)  # what it maps stays there after the files are unlinked


@dataclass(frozen=True, slots=True)
class Shared:
    """A model in Ray's object store: workers of one machine map the same copy of its parameters.

    Attributes:
        config: of the model.
        state: a reference to its parameters by name, as arrays.
    """

    config: AlitConfig
    state: Any

    @staticmethod
    def of(model: Alit) -> Shared:
        import ray

        return Shared(model.config, ray.put({name: tensor.numpy() for name, tensor in model.state_dict().items()}))

    def model(self) -> Alit:
        """The model, to be used and not to be trained: its parameters cannot be written to."""
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
