"""The packaged weights give an image the same tokens in any batch and any order."""

from __future__ import annotations

import pytest
import torch

from alit.weights import load_weights
from jobs.training.feed import read_validation_images

PHOTOGRAPHS = 224
NEAR_TIE = 1e-5


@pytest.fixture(scope="module")
def photographs(shared):
    weights = load_weights()
    source = str(shared / "data" / "photos-136" / "val-*.parquet")
    return read_validation_images(source, size=weights.model.config.image_size, limit=PHOTOGRAPHS)


@pytest.mark.parametrize("name", ["l1", "latent"])
def test_encode_is_independent_of_batch_and_order(photographs, name):
    """Length and ids of an image depend neither on the batch size nor on the order of the images."""
    model = load_weights().model
    assert len(photographs) >= 200
    every_length = model.encode(photographs, f"{name}:0").trace  # a threshold that nothing meets
    middle = every_length[:, 1].median().item()  # one at which many images are near their limit
    criterion = f"{name}:{middle:.4f}"
    reference = model.encode(photographs, criterion)
    tokens = reference.split()
    assert len(set(reference.num_tokens.tolist())) > 1, "a threshold that spreads the lengths"
    order = torch.randperm(len(photographs), generator=torch.Generator().manual_seed(0))
    flipped_lengths, flipped_ids, ids = 0, 0, 0
    for size in (1, 7, 32):
        for rows in order.split(size):
            encoded = model.encode(photographs[rows], criterion)
            for row, length, found in zip(rows.tolist(), encoded.num_tokens.tolist(), encoded.split(), strict=True):
                if length != reference.num_tokens[row]:
                    flipped_lengths += 1
                    shorter = min(length, int(reference.num_tokens[row])) // model.config.latents_per_iteration - 1
                    assert abs(reference.trace[row, shorter] - float(criterion.partition(":")[2])) < NEAR_TIE
                else:
                    ids += length
                    flipped_ids += int((found != tokens[row]).sum())
    print(f"{name}: {flipped_lengths} lengths and {flipped_ids} of {ids} ids flipped")
    assert flipped_lengths <= 3
    assert flipped_ids < ids / 1000
