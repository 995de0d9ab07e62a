"""Input and output on S3, over a real S3 server."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
import torch

from alit.dataset import TokenDataset, metadata_of
from alit.errors import TrainingError
from alit.images.encode import encode_image
from alit.model.config import AlitConfig, VQGANConfig
from alit.tokenizer import Alit
from alit.weights import load_weights, save_weights
from jobs.dataset.folder import Totals, finish
from jobs.dataset.plan import write_plan
from jobs.sources.open import make_plan, open_input
from jobs.sources.records import InputError
from jobs.storage.path import parse_uri
from jobs.storage.retry import StorageError
from jobs.tokenization.shard import Job, decoded_batches, tokenize_shard
from jobs.training.checkpoints import Checkpoints, Saved


def test_s3_file_is_written_read_and_listed(bucket):
    """A file on S3 is written with one request, read back and listed."""
    query, folder, log = bucket
    where = parse_uri(f"s3://photos/some/folder?{query}")
    data = secrets.token_bytes(300_000)
    (where / "a.bin").write(data)
    assert (where / "a.bin").read() == data
    assert where.names() == ["a.bin"]
    assert (where / "a.bin").exists()
    assert not (where / "b.bin").exists()
    assert (folder / "some" / "folder" / "a.bin").read_bytes() == data
    assert "uploads" not in log.read_text(), "a small file is one PUT, no multipart upload"


def test_s3_corpus_becomes_a_dataset_on_s3(bucket, tmp_path):
    """Images on S3 become a dataset on S3 that can be read back."""
    query, _, _ = bucket
    base = VQGANConfig(channels=(4, 4), blocks=1, latent_dim=4, codebook_size=8, norm_groups=2)
    sizes = {"image_size": 16, "width": 16, "depth": 1, "heads": 2, "latents_per_iteration": 4, "iterations": 3}
    torch.manual_seed(0)
    save_weights(tmp_path / "weights", Alit(AlitConfig(base=base, codebook_size=16, **sizes)), provenance={})
    weights = load_weights(tmp_path / "weights")
    source = parse_uri(f"s3://photos/in?{query}")
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        (source / "deep" / f"{i} ü.png").write(encode_image(pixels))
    (source / "broken.jpg").write(b"text")
    output, metadata = parse_uri(f"s3://photos/out?{query}"), metadata_of(weights, "l1:0.3")
    plan = write_plan(output, open_input(f"s3://photos/in?{query}", rows_per_file=4), 4, None)
    job = Job(source=plan.source, output=output, metadata=metadata)
    totals = Totals()
    for shard in map(plan.shard, range(plan.shards)):
        *_, last = tokenize_shard(job, weights.model, shard, decoded_batches(job, shard))
        totals.add(last)
    finish(output, metadata, plan, totals)
    dataset = TokenDataset(job.output.path, job.output.filesystem)
    assert sorted(dataset.table().column("id").to_pylist()) == [f"deep/{i} ü.png" for i in range(5)]
    assert dataset.rejects().column("id").to_pylist() == ["broken.jpg"]
    assert sum(len(dataset.decode(weights, rows)) for rows in dataset.batches(3)) == 5


def test_s3_refuses_a_missing_bucket(bucket):
    """A URI without a bucket and a bucket that does not exist are refused with one sentence."""
    query, _, _ = bucket
    with pytest.raises(StorageError, match="names no bucket"):
        parse_uri("s3://")
    with pytest.raises(ValueError, match="does not exist"):
        make_plan(f"s3://absent/in?{query}", rows_per_file=4)


def test_s3_refuses_wrong_options_and_credentials(bucket, monkeypatch):
    """Wrong options and credentials of a URI are refused with one sentence each, without secrets."""
    query, _, _ = bucket
    (parse_uri(f"s3://photos/locked?{query}") / "a.jpg").write(b"")
    for uri, expected in (
        ("s3://key:secret@photos/in", "must not hold credentials"),
        ("s3://photos/in?secret_key=x", "must not hold credentials"),
        ("s3://photos/in?endpint=http://x", "unknown option 'endpint'; there are endpoint, region"),
        ("s3://photos/in?timeout=soon", "must be a number of seconds above 0, got 'soon'"),
        ("s3://photos/in?anonymous=yes", "anonymous must be true or false"),
        ("https://photos/in", "is no folder"),
        ("gopher://photos/in", "cannot be opened: Protocol not known"),
    ):
        with pytest.raises(StorageError, match=expected):
            parse_uri(uri)
    assert "secret" not in repr(parse_uri(f"s3://photos/in?{query}"))
    for changes, words in (
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "denied|signature"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": "/nowhere"},
            "no credentials were found; set AWS",
        ),
    ):
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setenv(name, value)
            uri = f"s3://photos/locked?{query}&timeout={20 + len(changes)}"  # a client of its own
            with pytest.raises(InputError, match=words) as caught:
                make_plan(uri, rows_per_file=4)
            assert "\n" not in str(caught.value)
    assert make_plan(f"s3://photos/locked?{query}", rows_per_file=4).images == 1


def test_s3_upload_is_all_or_nothing(bucket):
    """A file written in pieces appears whole, and not at all when the writer is interrupted."""
    query, folder, _ = bucket
    where = parse_uri(f"s3://photos/pieces?{query}")
    piece = secrets.token_bytes(1 << 20)
    with (where / "large").open_write() as file:
        for _ in range(100):  # past the size at which it waits for the network
            file.write(piece)
    assert (folder / "pieces" / "large").read_bytes() == 100 * piece

    def interrupted(pieces: int) -> None:
        with (where / "interrupted").open_write() as file:
            for _ in range(pieces):
                file.write(piece)
            raise KeyboardInterrupt

    for pieces in (1, 12):  # one PUT, and a multipart upload
        with pytest.raises(KeyboardInterrupt):
            interrupted(pieces)
        assert where.names() == ["large"]
    (where / "large").remove_file()
    (where / "large").remove_file()
    assert where.names() == []


def test_checkpoints_on_s3_are_pruned_and_checked(bucket):
    """Checkpoints on S3 are kept, pruned and checked for damage as on a disk."""
    query, _, _ = bucket
    folder = parse_uri(f"s3://photos/run/checkpoints?{query}")
    said: list[str] = []
    checkpoints = Checkpoints(folder, keep=1, report=said.append)
    assert checkpoints.load_latest() is None
    for step, score in ((1, 0.1), (2, 0.3), (3, 0.2)):
        checkpoints.save({"step": step, "weight": torch.full((4_000_000,), step)}, step, score)
    assert checkpoints.list() == [Saved(step=1, score=0.1), Saved(step=3, score=0.2)]
    assert len(folder.names()) == 4
    data = (folder / "step-00000003.pt").read()
    (folder / "step-00000003.pt").write(data[:-1] + bytes([data[-1] ^ 1]))
    found = Checkpoints(folder, report=said.append).load_latest()
    assert found is not None
    assert found["step"] == 1
    assert torch.equal(found["weight"], torch.full((4_000_000,), 1))
    assert said == [
        "'photos/run/checkpoints/step-00000003.pt' is damaged (its SHA-256 is not the one that was written); "
        "falling back to step 1"
    ]
    (folder / "step-00000001.pt").remove_file()
    with pytest.raises(TrainingError, match=r"step-00000001.pt' is damaged \(it is missing\); put a good copy"):
        checkpoints.load_latest()
