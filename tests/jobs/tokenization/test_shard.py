"""A shard becomes two Parquet files, with the same bytes in every run; without Ray."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import noise_image
from small_models import SMALL, random_model

from alit.dataset import DATA, METADATA_KEY, REJECTS, Metadata, checked_criterion, reject_schema, token_schema
from alit.errors import AlitError, CriterionError
from alit.images.decode import decode_image
from alit.weights import Weights, load_weights, save_weights
from jobs.dataset.counts import SHARD_KEY, Counts, file_name, written_counts
from jobs.sources.decode import Decoded, concatenate
from jobs.sources.open import open_input
from jobs.sources.records import Plan
from jobs.storage.path import StoragePath, parse_uri
from jobs.tokenization import shard as shards
from jobs.tokenization.description import TokenizeJob, describe_job
from jobs.tokenization.options import TokenizeOptions
from jobs.tokenization.shard import ShardFiles, decoded_batches


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker: the last bits of the scores depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp("weights") / "small"
    save_weights(folder, random_model(SMALL), provenance={})
    return load_weights(folder)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven rows, two of them bad, with a label."""
    data = [noise_image(seed) for seed in range(11)]
    data[2], data[7] = b"text", None
    path = tmp_path_factory.mktemp("input") / "t.parquet"
    labels = pa.array([[f"label {row}", None] for row in range(11)])
    pq.write_table(pa.table({"image": pa.array(data, pa.binary()), "label": labels}), path)
    return path


def plan_of(source: Path, rows_per_file: int = 5, keep: tuple[str, ...] = ("label",)) -> Plan:
    found = open_input(str(source), rows_per_file=rows_per_file, keep=keep)
    return Plan(source=found.source, shards=tuple(found.shards))


def middle(weights: Weights) -> str:
    """A criterion under which this table's images get various lengths."""
    images = torch.stack([torch.from_numpy(decode_image(noise_image(seed), 32).pixels) for seed in range(11)])
    trace = weights.model.encode(images.permute(0, 3, 1, 2), "l1:0").trace
    return f"l1:{trace[:, 0].median().item():.6f}"


def job_of(plan: Plan, output: Path, weights: Weights, **changes: object) -> TokenizeJob:
    options = TokenizeOptions(batch_size=2)
    job = describe_job(options, weights, middle(weights), plan.source, parse_uri(str(output)))
    return replace(job, **changes)


def run(job: TokenizeJob, weights: Weights, plan: Plan, *, numbers: tuple[int, ...] | None = None) -> list[Counts]:
    """Tokenizes shards as the actor does, in this process."""
    progress: list[Counts] = []
    for shard in plan.shards:
        if numbers is None or shard.number in numbers:
            batches: Iterator[Decoded] = decoded_batches(job, shard)
            progress += shards.tokenize_shard(job, weights.model, shard, batches)
    return progress


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shard_becomes_a_token_and_a_reject_file(tmp_path: Path, table: Path, weights: Weights) -> None:
    """A shard becomes one token file and one reject file with schemas, metadata and counts."""
    plan = plan_of(table)
    job = job_of(plan, tmp_path, weights)
    progress = run(job, weights, plan)
    names = [f"{folder}/{file_name(number)}" for folder in (REJECTS, DATA) for number in range(3)]
    assert sorted(contents(tmp_path)) == sorted(names)
    tokens, rejects = (
        [pq.read_table(tmp_path / folder / file_name(n)) for n in range(3)] for folder in (DATA, REJECTS)
    )
    for number, file in enumerate(tokens):
        assert file.schema.equals(token_schema(job.metadata, plan.source.kept))
        assert file.schema.metadata is not None
        assert set(file.schema.metadata) == {METADATA_KEY, SHARD_KEY}
        assert Metadata.from_bytes(file.schema.metadata[METADATA_KEY], "") == job.metadata
        assert json.loads(file.schema.metadata[SHARD_KEY])["shard"] == number
    for file in rejects:
        assert file.schema.equals(reject_schema(job.metadata, plan.source.kept), check_metadata=True)
    assert [len(file) for file in tokens] == [4, 4, 1]
    assert pa.concat_tables(tokens)["id"].to_pylist() == [f"t.parquet#{row}" for row in range(11) if row not in (2, 7)]
    assert pa.concat_tables(rejects).to_pylist() == [
        {
            "id": "t.parquet#2",
            "reason": "not_an_image",
            "message": "the file starts with b'text'; expected a JPEG, PNG, WebP, GIF, BMP or TIFF file",
            "label": ["label 2", None],
        },
        {
            "id": "t.parquet#7",
            "reason": "unreadable",
            "message": "the column 'image' is null here",
            "label": ["label 7", None],
        },
    ]
    for row in pa.concat_tables(tokens).to_pylist():
        number = row["id"].split("#")[1]
        assert row["label"] == [f"label {number}", None]
        assert (row["width"], row["height"]) == (30, 20 + int(number))
        assert len(row["tokens"]) == row["num_tokens"]
        assert row["trace"][-1] == row["score"]
        assert len(row["trace"]) * 4 == row["num_tokens"]
    lengths = pa.concat_tables(tokens)["num_tokens"].to_pylist()
    assert len(set(lengths)) > 1, "the criterion of this test should spread the lengths"
    done = [p for p in progress if p.done]
    assert [(p.shard, p.images, p.rejects) for p in done] == [(0, 4, 1), (1, 4, 1), (2, 1, 0)]
    assert np.sum([p.lengths for p in done], 0).tolist() == [lengths.count(n) for n in (4, 8, 12)]


def test_shard_reports_every_batch_and_the_whole(
    tmp_path: Path, table: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress is reported after every batch, and at the end for the whole shard."""
    monkeypatch.setattr(shards, "REPORT_INTERVAL", 0.0)
    plan = plan_of(table)
    progress = run(job_of(plan, tmp_path, weights), weights, plan, numbers=(0,))
    assert [(p.images, p.rejects, p.done) for p in progress] == [
        *((2, 0, False), (3, 1, False), (4, 1, False), (4, 1, True))
    ]


def test_shard_files_are_deterministic(tmp_path: Path, table: Path, weights: Weights) -> None:
    """Two runs write the same bytes."""
    plan = plan_of(table)
    for name in ("one", "two"):
        run(job_of(plan, tmp_path / name, weights), weights, plan)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_joined_parts_equal_the_whole_batch(table: Path, weights: Weights) -> None:
    """Parts of a batch that are joined equal the batch decoded at once."""
    plan = plan_of(table, 11)
    job = job_of(plan, Path("/nowhere"), weights, batch_size=11)
    (whole,) = decoded_batches(job, plan.shards[0])
    parts = list(decoded_batches(replace(job, batch_size=4), plan.shards[0]))
    found = concatenate(parts)
    assert [len(part.ids) for part in parts] == [4, 4, 3]
    assert (found.ids, found.rejects) == (whole.ids, whole.rejects)
    for a, b in zip((found.good, found.pixels, found.sizes), (whole.good, whole.pixels, whole.sizes), strict=True):
        assert (a == b).all()
    assert [k.to_pylist() for k in found.kept] == [k.to_pylist() for k in whole.kept]


def test_shard_writes_its_counts_in_the_footer(tmp_path: Path, table: Path, weights: Weights) -> None:
    """A shard's counts can be read from the footers of its files."""
    plan = plan_of(table)
    job = job_of(plan, tmp_path, weights)
    assert written_counts(job.output, 0) is None
    told = [counts for counts in run(job, weights, plan) if counts.done]
    for counts in told:
        expected = counts._replace(seconds=0.0, first_reject="")
        assert written_counts(job.output, counts.shard) == expected
    assert sum(counts.images for counts in told) == 9
    assert told[0].first_reject.startswith("'t.parquet#2': ")


def test_encoded_batches_agree_with_and_without_pool(table: Path, weights: Weights) -> None:
    """Tokens are the same with and without pooling across batches."""
    plan = plan_of(table, 11)
    job = job_of(plan, Path("/nowhere"), weights)
    found = []
    for pool in (False, True):
        batches = decoded_batches(job, plan.shards[0])
        found.append(list(shards.encoded_batches(weights.model, batches, job.criterion, "float32", 2, pool)))
    assert len(found[0]) == len(found[1]) == 6
    for (decoded, alone), (other, together) in zip(*found, strict=True):
        assert decoded.ids == other.ids
        assert alone.tokens.equal(together.tokens)
        assert alone.num_tokens.equal(together.num_tokens)
        assert torch.allclose(alone.trace, together.trace, atol=1e-5, equal_nan=True)


def test_shard_files_are_independent_of_other_shards(tmp_path: Path, table: Path, weights: Weights) -> None:
    """The files of a shard do not depend on which other shards are tokenized."""
    plan = plan_of(table)
    run(job_of(plan, tmp_path / "all", weights), weights, plan)
    run(job_of(plan, tmp_path / "one", weights), weights, plan, numbers=(1,))
    found = contents(tmp_path / "one")
    assert len(found) == 2
    assert found.items() <= contents(tmp_path / "all").items()


def test_shard_without_images_has_both_files(tmp_path: Path, weights: Weights) -> None:
    """A shard without a good image has an empty token file and a reject file."""
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.jpg").write_bytes(b"")
    plan = plan_of(tmp_path / "in", keep=())
    run(job_of(plan, tmp_path / "out", weights), weights, plan)
    assert pq.read_table(tmp_path / "out" / DATA / file_name(0)).num_rows == 0
    assert pq.read_table(tmp_path / "out" / REJECTS / file_name(0))["reason"].to_pylist() == ["empty"] * 2


def test_shard_tokens_equal_those_of_single_images(tmp_path: Path, table: Path, weights: Weights) -> None:
    """Every image has the tokens and the score that the model gives it alone."""
    plan = plan_of(table)
    job = job_of(plan, tmp_path, weights, batch_size=4)
    run(job, weights, plan)
    for row in pq.read_table(tmp_path / DATA).to_pylist():
        image = decode_image(noise_image(int(row["id"].split("#")[1])), 32).pixels
        alone = weights.model.encode(torch.from_numpy(image).permute(2, 0, 1)[None], job.criterion)
        assert row["tokens"] == alone.tokens.tolist()
        assert row["score"] == pytest.approx(alone.score.item(), abs=1e-5)


def test_shard_of_a_fixed_length_has_no_scores(tmp_path: Path, table: Path, weights: Weights) -> None:
    """With a fixed length, scores are null and traces are empty."""
    plan = plan_of(table)
    job = job_of(plan, tmp_path, weights, criterion="fixed:8")
    run(job, weights, plan)
    found = pq.read_table(tmp_path / DATA)
    assert set(found["num_tokens"].to_pylist()) == {8}
    assert found["score"].null_count == len(found)
    assert found["trace"].to_pylist() == [[]] * len(found)
    assert all(found["satisfied"].to_pylist())


def test_shard_crash_before_rename_leaves_no_file(
    tmp_path: Path, table: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash before the rename of a file leaves no file."""

    def crash(self: Path, target: Path) -> None:
        assert self.read_bytes().startswith(b"PAR1"), "the temporary file is whole by now"
        raise KeyboardInterrupt

    plan = plan_of(table)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            run(job_of(plan, tmp_path, weights), weights, plan)
    assert contents(tmp_path) == {}


def test_shard_writes_tokens_after_rejects(
    tmp_path: Path, table: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token file, which marks a shard as finished, is written after the reject file."""
    plan, written = plan_of(table), []
    monkeypatch.setattr(StoragePath, "write", lambda self, data: written.append(Path(self.path).parent.name))
    ShardFiles(job_of(plan, tmp_path, weights)).write(Counts(0, 0, 0, [0, 0, 0], 0, 0.0, True))
    assert written == [REJECTS, DATA]


def test_checked_criterion_refuses_continuous_latents(tmp_path: Path) -> None:
    """Weights with continuous latents cannot make a token dataset."""
    save_weights(tmp_path / "w", random_model(replace(SMALL, codebook_size=None)), provenance={})
    with pytest.raises(AlitError, match="continuous latents"):
        checked_criterion(load_weights(tmp_path / "w"), "l1:0.1")


def test_checked_criterion_refuses_an_impossible_length(weights: Weights) -> None:
    """A fixed length that the model does not have is refused."""
    with pytest.raises(CriterionError, match="4, 8, 12 tokens, not 5"):
        checked_criterion(weights, "fixed:5")


def test_job_refuses_batches_without_images(tmp_path: Path, table: Path, weights: Weights) -> None:
    """The batch size must be at least 1."""
    with pytest.raises(AlitError, match="--batch-size must be at least 1, got 0"):
        job_of(plan_of(table), tmp_path, weights, batch_size=0)
