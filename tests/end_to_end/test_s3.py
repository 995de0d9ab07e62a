"""A tokenize job from S3 to S3, over a real S3 server."""

from __future__ import annotations

import numpy as np
from small_models import SMALLER, random_model
from tokenizing import tokenize_in_process

from alit.dataset import TokenDataset
from alit.images.encode import encode_image
from alit.weights import load_weights, save_weights
from jobs.storage.path import parse_uri


def test_s3_corpus_becomes_a_dataset_on_s3(bucket, tmp_path):
    """Images on S3 become a dataset on S3 that can be read back."""
    query, _, _ = bucket
    save_weights(tmp_path / "weights", random_model(SMALLER), provenance={})
    weights = load_weights(tmp_path / "weights")
    source = parse_uri(f"s3://photos/corpus/in?{query}")
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        (source / "deep" / f"{i} ü.png").write(encode_image(pixels))
    (source / "broken.jpg").write(b"text")
    target = f"s3://photos/corpus/out?{query}"
    tokenize_in_process(f"s3://photos/corpus/in?{query}", target, weights, "l1:0.3", rows_per_file=4)
    output = parse_uri(target)
    dataset = TokenDataset(output.path, output.filesystem)
    assert sorted(dataset.table().column("id").to_pylist()) == [f"deep/{i} ü.png" for i in range(5)]
    assert dataset.rejects().column("id").to_pylist() == ["broken.jpg"]
    assert sum(len(dataset.decode(weights, rows)) for rows in dataset.batches(3)) == 5
