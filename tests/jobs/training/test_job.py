"""`alit train` as a user runs it: mistakes, configuration files, dry runs and damaged checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from training_runs import OPTIONS, assert_same, save_base, tensors, write_smooth_images

from alit.weights import load_weights
from jobs.cli import main


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Forty smooth images and one broken file."""
    return write_smooth_images(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Weights of an untrained base, to distill."""
    return save_base(tmp_path_factory.mktemp("base") / "weights")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        main(["train", *map(str, arguments)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_train_reports_mistakes_and_writes_nothing(photographs, base, tmp_path, capsys):
    """Mistakes in options and inputs are reported with one sentence, and nothing is written."""
    run = tmp_path / "run"
    quick = ("--no-ray", "--init", base)
    for arguments, sentence in [
        ((tmp_path / "absent", run, *quick), "absent' does not exist"),
        ((tmp_path, run, *quick), "no images in"),
        ((photographs, run, *quick, "--batch-size", 64), "batch_size 64 is larger than the data: 41 images"),
        ((photographs, run, "--init", base, "--workers", 0), "--workers must be a number from 1, or a range"),
        ((photographs, run, "--init", base, "--workers", "2:1"), "--workers must be a number from 1, or a range"),
        ((photographs, run, "--init", base, "--workers", 3), "--batch-size 16 cannot be shared equally by 3 workers"),
        ((photographs, run, *quick, "--workers", 2), "--no-ray trains with one worker"),
        ((photographs, run, "--no-ray"), "distill starts from a trained base: name the weights folder with --init"),
        ((photographs, run, *quick, "--criterion", "beauty:1"), "beauty"),
        ((photographs, run, *quick, "--steps", 0), "steps must be at least 1, got 0"),
        ((photographs, run, *quick, "--preset", "giant"), "the preset must be one of nano, tiny"),
        ((photographs, run, *quick, "--config", tmp_path / "absent.toml"), "cannot be read as TOML"),
        ((photographs, "s3://", *quick), "does not name a bucket or folder"),
        ((photographs, run, *quick, "--sharding", "fsdp"), "needs --workers 2 or more"),
    ]:
        assert sentence in refused(capsys, "distill", *arguments), arguments
    (tmp_path / "vgg.pth").write_bytes(b"no weights at all")
    vgg = ("--vgg", tmp_path / "vgg.pth", "--lpips", tmp_path / "vgg.pth")
    assert "vgg.pth" in refused(capsys, "base", photographs, run, "--no-ray", *vgg)
    assert "needs both files" in refused(capsys, "base", photographs, run, "--no-ray", *vgg[:2])
    assert "holds a base: distill it first" in refused(capsys, "finetune", photographs, run, *quick)
    (tmp_path / "run.toml").write_text("steps = 3\nlearning_speed = 1.0\n")
    wrong = refused(capsys, "distill", photographs, run, *quick, "--config", tmp_path / "run.toml")
    assert "a recipe for distill has no field 'learning_speed'" in wrong
    assert not run.exists()


def test_train_refuses_an_unwritable_run_folder(photographs, base, tmp_path, capsys):
    """A run folder that cannot be written is refused with one sentence."""
    (tmp_path / "file").write_text("in the way")
    error = refused(capsys, "distill", photographs, tmp_path / "file" / "run", "--no-ray", "--init", base)
    assert "cannot be" in error
    assert (tmp_path / "file").read_text() == "in the way"


def test_train_reports_missing_permission(photographs, base, bucket, capsys, monkeypatch):
    """Storage without permission is reported with one sentence, and credentials in a URI are refused."""
    query, folder, _ = bucket
    with_key = f"s3://somebody:else@photos/forbidden?{query}"
    assert "must not hold credentials" in refused(capsys, "distill", photographs, with_key, "--no-ray", "--init", base)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    run = f"s3://photos/forbidden?{query}&timeout=29"  # options of its own, so a client of its own
    assert "cannot be" in (error := refused(capsys, "distill", photographs, run, "--no-ray", "--init", base))
    assert "denied" in error or "signature" in error
    assert not (folder / "forbidden").exists()


def test_train_command_line_overrides_the_config_file(photographs, base, tmp_path, capsys):
    """A configuration file gives defaults, and the command line overrides them."""
    (tmp_path / "run.toml").write_text(f'steps = 4\nbatch_size = 8\nwarmup = 2\nray = false\ninit = "{base}"\n')
    run = tmp_path / "run"
    main(["train", "distill", str(photographs), str(run), "--config", str(tmp_path / "run.toml"), "--steps", "3"])
    written = json.loads((run / "run.json").read_text())
    assert (written["recipe"]["steps"], written["recipe"]["batch_size"], written["init"]) == (3, 8, str(base))
    assert load_weights(run / "weights").provenance["recipe"] == written["recipe"]
    assert "41 images; 3 steps of 8" in capsys.readouterr().err


def test_train_dry_run_prints_the_plan(photographs, base, tmp_path, capsys):
    """A dry run prints the plan and writes nothing."""
    run = tmp_path / "run"
    main(["train", "distill", str(photographs), str(run), "--init", str(base), "--dry-run", "--workers", "2"])
    said = capsys.readouterr().err
    assert re.search(r"distill: 16 px, 4 to 16 tokens, 0\.\d\d M parameters trained", said)
    assert "41 images; 3500 steps of 16 are 1750.0 epochs" in said
    assert "memory per worker" in said
    assert not run.exists()


def test_train_falls_back_from_a_damaged_checkpoint(photographs, base, tmp_path, capsys):
    """With a damaged last checkpoint, training resumes at the one before and ends with the same weights."""
    run = tmp_path / "run"
    common = ["train", "distill", str(photographs), str(run), *OPTIONS, "--init", str(base), "--no-ray"]
    main([*common, "--checkpoint-every", "3", "--steps", "6"])
    whole = tensors(run)
    newest_file = sorted((run / "checkpoints").glob("*.pt"))[-1]
    newest_file.write_bytes(newest_file.read_bytes()[:1000])
    capsys.readouterr()
    main([*common, "--checkpoint-every", "3", "--steps", "6"])
    said = capsys.readouterr().err
    assert "is damaged" in said
    assert "resuming at step 3" in said
    assert_same(tensors(run), whole)
