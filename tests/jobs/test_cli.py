"""The smaller commands end to end: train, show, benchmark, demo's parts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from alit.dataset import metadata_of
from alit.encoding.criteria import parse
from alit.errors import AlitError
from alit.images.encode import encode_image
from alit.model.config import AlitConfig, VQGANConfig
from alit.tokenizer import Alit
from alit.weights import load_weights, save_weights
from jobs import cli
from jobs.benchmarks.encoding import benchmark_encode, time_encode
from jobs.benchmarks.tokenization import bare_loop
from jobs.dataset.folder import Totals, finish
from jobs.dataset.plan import write_plan
from jobs.gallery.job import show
from jobs.gallery.options import ShowOptions
from jobs.sources.open import make_plan, open_input
from jobs.storage.path import parse_uri
from jobs.tokenization.shard import Job, decoded_batches, tokenize_shard


def config() -> AlitConfig:
    base = VQGANConfig(channels=(4, 4), blocks=1, latent_dim=4, codebook_size=8, norm_groups=2)
    return AlitConfig(
        base=base, image_size=16, width=16, depth=1, heads=2, latents_per_iteration=4, iterations=3, codebook_size=16
    )


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (3, 3, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        (folder / f"{i:02d}.png").write_bytes(encode_image(pixels))
    return folder


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    save_weights(tmp_path / "weights", Alit(config()), provenance={})
    return tmp_path / "weights"


def tokenized(photographs, weights, folder, criterion):
    """The main job without Ray: its own stages, called one after the other."""
    loaded = load_weights(weights)
    output, metadata = parse_uri(str(folder)), metadata_of(loaded, criterion)
    plan = write_plan(output, open_input(str(photographs), rows_per_file=5), 5, None)
    job = Job(source=plan.source, output=output, metadata=metadata, batch_size=4)
    totals = Totals()
    for shard in map(plan.shard, range(plan.shards)):
        *_, last = tokenize_shard(job, loaded.model, shard, decoded_batches(job, shard))
        totals.add(last)
    finish(output, metadata, plan, totals)


@pytest.mark.parametrize("criterion", ["l1:0.3", "psnr:9", "fixed:8"])
def test_show_draws_every_image(photographs, weights, tmp_path, criterion):
    """The gallery shows every tokenized image and names the rejected ones."""
    (photographs / "broken.jpg").write_bytes(b"not a picture")
    tokenized(photographs, weights, tmp_path / "tokens", criterion)
    shown = show(str(tmp_path / "tokens"), str(photographs), tmp_path / "page.html", ShowOptions(weights=str(weights)))
    page = (tmp_path / "page.html").read_text()
    assert shown == 12
    assert all(f"{i:02d}.png" in page for i in range(12))
    assert "broken.jpg" in page


def test_show_refuses_other_weights_and_inputs(photographs, weights, tmp_path):
    """The gallery refuses weights and inputs that the dataset was not made with, and writes nothing."""
    tokenized(photographs, weights, tmp_path / "tokens", "fixed:4")
    torch.manual_seed(1)
    save_weights(tmp_path / "other", Alit(config()), provenance={})
    with pytest.raises(AlitError, match="was tokenized with the weights"):
        show(
            str(tmp_path / "tokens"),
            str(photographs),
            tmp_path / "page.html",
            ShowOptions(weights=str(tmp_path / "other")),
        )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "stranger.png").write_bytes((photographs / "00.png").read_bytes())
    with pytest.raises(AlitError, match="no image of"):
        show(str(tmp_path / "tokens"), str(elsewhere), tmp_path / "page.html", ShowOptions(weights=str(weights)))
    assert not (tmp_path / "page.html").exists()


def test_train_runs_all_three_stages(photographs, weights, tmp_path):
    """Three commands lead from photographs to finetuned weights, each continuing from the previous stage."""
    before, folder = None, weights
    for stage in ("base", "distill", "finetune"):
        run = tmp_path / stage
        options = ["--init", folder, "--validation", photographs, "--steps", 3, "--batch-size", 4, "--no-ray"]
        cli.main(["train", stage, str(photographs), str(run), *map(str, options)])
        loaded, folder = load_weights(run / "weights"), run / "weights"
        assert loaded.provenance["stage"] == stage
        if stage == "distill":
            for name, tensor in before.model.base.state_dict().items():
                assert torch.equal(tensor, loaded.model.base.state_dict()[name]), (
                    "distillation leaves the base as it is"
                )
        if stage == "finetune":
            assert loaded.provenance["init_fingerprint"] == before.fingerprint
            decoder = loaded.model.base.decoder.conv_out.weight
            assert not torch.equal(decoder, before.model.base.decoder.conv_out.weight), "finetuning trains the base too"
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert any(name.startswith("val_l1") for name in rows[-1])
        before = loaded


def test_time_encode_measures_lengths_and_tokens(weights):
    """The encode benchmark times every fixed length and the criterion, with the model's mean tokens."""
    model = load_weights(weights).model
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    criterion = parse("l1:0.4")
    times = time_encode(model, images, criterion, rounds=2)
    assert set(times.fixed) == {4, 8, 12}
    assert times.mean_tokens == pytest.approx(model.encode(images, criterion).num_tokens.double().mean().item())
    assert 0 < times.implied <= times.every * 1.5
    assert times.ratio > 0


def test_bare_loop_runs_without_output(photographs, weights, tmp_path):
    """The bare loop of the tokenize benchmark encodes the images and writes nothing."""
    loaded = load_weights(weights)
    plan = make_plan(str(photographs), rows_per_file=5)
    job = Job(
        source=plan.source,
        output=parse_uri(str(tmp_path / "out")),
        metadata=metadata_of(loaded, "l1:0.3"),
    )
    assert bare_loop(job, plan, loaded.model, 1) > 0
    assert not (tmp_path / "out").exists()
    with pytest.raises(AlitError, match="adaptive"):
        benchmark_encode(
            str(photographs),
            criterion="fixed:4",
            weights=str(weights),
            batch_size=4,
            rounds=1,
            image_column="image",
            console=Console(quiet=True),
        )


def test_cli_every_command_has_help(capsys):
    """Every command and every training stage prints its usage and exits with code 0."""
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        assert "usage: alit " + name in capsys.readouterr().out
    for stage in ("base", "distill", "finetune"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", stage, "--help"])
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert f"usage: alit train {stage}" in said
        assert "--learning-rate" in said


def test_cli_reports_mistakes_with_one_line_and_code_2(tmp_path, capsys):
    """A user's mistake is one line on standard error and exit code 2, without a traceback."""
    for arguments in (
        ["tokenize", str(tmp_path / "missing"), str(tmp_path / "out")],
        ["convert", str(tmp_path / "missing.pth"), str(tmp_path / "out")],
        ["show", str(tmp_path), str(tmp_path), str(tmp_path / "page.html"), "--weights", str(tmp_path)],
        ["evaluate", str(tmp_path), "--weights", str(tmp_path)],
        ["train", "base", str(tmp_path), str(tmp_path / "run"), "--steps", "1", "--perceptual-weight", "0"],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2, arguments
        assert error.startswith("alit: "), error
        assert len(error.strip().splitlines()) == 1, error
        assert "Traceback" not in error
