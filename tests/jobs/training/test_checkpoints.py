"""Checkpoints are written completely or not at all, are restored exactly, and survive damage to others."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

from alit.errors import ConfigError, TrainingError
from jobs.storage.path import parse_uri
from jobs.storage.retry import StorageError
from jobs.training.checkpoints import Checkpoints, Saved


def opened(folder: Path, **options: Any) -> tuple[Checkpoints, list[str]]:
    """The checkpoints of a folder, and the sentences that they report."""
    said: list[str] = []
    return Checkpoints(parse_uri(str(folder)), report=said.append, **options), said


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weight": torch.full((1000,), float(step))}


def saved(folder: Path, *steps: int, keep: int = 9) -> None:
    checkpoints, said = opened(folder, keep=keep)
    for step in steps:
        checkpoints.save(state(step), step)
    assert not said


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to make a file larger, as it does when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_checkpoints_restore_a_state_exactly(tmp_path):
    """A saved state is restored exactly: plain values, tensors, generator, model and optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    plain = {"step": 7, "rate": 0.1, "name": "ü", "none": None, "yes": True, "deep": {"list": [1, {"x": (2, 3)}]}}
    tensors = {"bf16": torch.rand(5).bfloat16(), "ids": torch.arange(4), "generator": torch.Generator().get_state()}
    whole = plain | tensors | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoints, said = opened(tmp_path / "new" / "folder")
    checkpoints.save(whole, 7, 0.25)
    found = checkpoints.load_latest()
    assert found is not None
    assert {name: found[name] for name in plain} == plain
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    again = torch.nn.Linear(3, 2)
    again.load_state_dict(found["model"])
    assert torch.equal(again.weight, model.weight)
    other = torch.optim.AdamW(again.parameters())
    other.load_state_dict(found["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1
    assert torch.equal(other.state[again.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert checkpoints.list() == [Saved(step=7, score=0.25)]
    assert not said


def test_checkpoints_describe_the_state_in_json(tmp_path):
    """The JSON file holds step, size, hash and score of the state beside it."""
    saved(tmp_path, 1000)
    assert names(tmp_path) == ["step-00001000.json", "step-00001000.pt"]
    data = (tmp_path / "step-00001000.pt").read_bytes()
    expected = {"step": 1000, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "score": None}
    assert json.loads((tmp_path / "step-00001000.json").read_text()) == expected | {"file": "step-00001000.pt"}


def test_checkpoints_of_an_empty_folder_are_none(tmp_path):
    """A folder that is missing or empty has no checkpoint and is not created."""
    for folder in (tmp_path, tmp_path / "absent"):
        checkpoints, _ = opened(folder)
        assert checkpoints.load_latest() is None
        assert checkpoints.list() == []
    assert not (tmp_path / "absent").exists()


def test_checkpoints_keep_at_least_one(tmp_path):
    """The number of checkpoints to keep must be at least 1."""
    with pytest.raises(ConfigError, match="keep must be at least 1, got 0"):
        opened(tmp_path, keep=0)


def test_checkpoints_survive_a_kill_during_a_write(tmp_path):
    """A process killed while writing leaves the older checkpoint, and the next save removes its remains."""
    script = f"""
import os, signal, sys, torch
from jobs.training.checkpoints import Checkpoints, _HashingWriter
from jobs.storage.path import parse_uri
checkpoints = Checkpoints(parse_uri({str(tmp_path)!r}))
checkpoints.save({{"step": 1}}, 1)
write = _HashingWriter.write
def write_and_die(self, data):
    count = write(self, data)
    if self.bytes > 400_000:
        os.kill(os.getpid(), signal.SIGKILL)
    return count
_HashingWriter.write = write_and_die
checkpoints.save({{"step": 2, "first": torch.zeros(100_000), "second": torch.zeros(100_000)}}, 2)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    assert left.stat().st_size >= 400_000
    checkpoints, said = opened(tmp_path)
    assert checkpoints.load_latest() == {"step": 1}
    checkpoints.save(state(2), 2)
    assert names(tmp_path) == ["step-00000001.json", "step-00000001.pt", "step-00000002.json", "step-00000002.pt"]
    assert not said


def test_checkpoints_survive_a_full_disk(tmp_path):
    """A full disk is reported with one sentence, and older checkpoints stay unchanged."""
    saved(tmp_path, 1, 2)
    before = contents(tmp_path)
    checkpoints, _ = opened(tmp_path, keep=1)
    large = {"first": torch.zeros(30_000), "second": torch.zeros(30_000)}
    for step in (2, 3):  # one that it has, and a new one
        with files_of_at_most(150_000), pytest.raises(StorageError, match="cannot be written: File too large"):
            checkpoints.save(large, step)
        assert contents(tmp_path) == before


def test_checkpoints_survive_an_unwritable_json_file(tmp_path, monkeypatch):
    """When the JSON file cannot be written, the older checkpoint remains the latest."""
    saved(tmp_path, 1, 2)
    checkpoints, _ = opened(tmp_path, keep=1)
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda record: dumps(record) + " " * 100_000)
    for step in (2, 3):
        with files_of_at_most(50_000), pytest.raises(StorageError, match="json' cannot be written"):
            checkpoints.save({"step": -1}, step)
        found = checkpoints.load_latest()
        assert found is not None
        assert found["step"] == 2


def test_checkpoints_refuse_a_file_as_folder(tmp_path):
    """A file in place of the folder and a folder that cannot be written are reported with one sentence."""
    (tmp_path / "file").write_text("")
    checkpoints, _ = opened(tmp_path / "file")
    with pytest.raises(StorageError, match=r"file' cannot be listed as a folder"):
        checkpoints.save(state(1), 1)
    with pytest.raises(StorageError, match=r"file' cannot be listed as a folder"):
        checkpoints.load_latest()
    checkpoints, _ = opened(Path("/proc/alit"))
    with pytest.raises(StorageError, match=r"'/proc/alit/step-00000001.pt' cannot be written"):
        checkpoints.save(state(1), 1)


def truncate(folder: Path) -> None:
    os.truncate(folder / "step-00000003.pt", 100)


def flip_a_byte(folder: Path) -> None:
    path = folder / "step-00000003.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove_the_state(folder: Path) -> None:
    (folder / "step-00000003.pt").unlink()


def cut_the_json(folder: Path) -> None:
    os.truncate(folder / "step-00000003.json", 20)


def describe_another(folder: Path) -> None:
    path = folder / "step-00000003.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"file": "../elsewhere.pt"}))


def describe_garbage(folder: Path) -> None:
    forge(folder, 3, b"no state at all")


def forge(folder: Path, step: int, data: bytes) -> None:
    """A checkpoint whose JSON file agrees with the bytes, whatever they are."""
    name = f"step-{step:08d}"
    (folder / f"{name}.pt").write_bytes(data)
    record = {"step": step, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "score": None}
    (folder / f"{name}.json").write_text(json.dumps(record))


DAMAGE = {
    truncate: r"step-00000003\.pt' is damaged \(100 bytes in place of \d+\)",
    flip_a_byte: r"step-00000003\.pt' is damaged \(its SHA-256 is not the one that was written\)",
    remove_the_state: r"step-00000003\.pt' is damaged \(it is missing\)",
    cut_the_json: r"step-00000003\.json' is damaged \(it describes no checkpoint\)",
    describe_another: r"step-00000003\.json' is damaged \(it describes no checkpoint\)",
    describe_garbage: r"step-00000003\.pt' is damaged \(no state: UnpicklingError\)",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_checkpoints_fall_back_from_a_damaged_one(tmp_path, damage):
    """A damaged checkpoint is reported, skipped for the one before and replaced by the next save."""
    saved(tmp_path, 1, 2, 3)
    damage(tmp_path)
    checkpoints, said = opened(tmp_path, keep=2)
    found = checkpoints.load_latest()
    assert found is not None
    assert found["step"] == 2
    (sentence,) = said
    assert re.fullmatch(rf"'{tmp_path}/{DAMAGE[damage]}; falling back to step 2", sentence)
    checkpoints.save(state(3), 3)
    found = opened(tmp_path)[0].load_latest()
    assert found is not None
    assert found["step"] == 3
    assert [one.step for one in checkpoints.list()] == [2, 3]
    assert sum(name.endswith(".pt") for name in names(tmp_path)) == 2


def test_checkpoints_prune_damaged_ones_first(tmp_path):
    """A damaged checkpoint does not displace an intact one."""
    saved(tmp_path, 10, 20)
    (tmp_path / "step-00000020.pt").write_bytes(b"")
    checkpoints, _ = opened(tmp_path, keep=1)
    checkpoints.load_latest()
    checkpoints.save(state(15), 15)
    assert names(tmp_path) == ["step-00000015.json", "step-00000015.pt"]


def test_checkpoints_never_execute_code(tmp_path):
    """A checkpoint that holds an object with code is refused, and the code does not run."""

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "done"),)

    saved(tmp_path, 1)
    torch.save({"step": 2, "code": Code()}, tmp_path / "made.pt")
    forge(tmp_path, 2, (tmp_path / "made.pt").read_bytes())
    checkpoints, said = opened(tmp_path)
    found = checkpoints.load_latest()
    assert found is not None
    assert found["step"] == 1
    assert said == [
        f"'{tmp_path}/step-00000002.pt' is damaged (it holds an object, posix.mkdir, that is no plain value); "
        "falling back to step 1"
    ]
    assert not (tmp_path / "done").exists()


def test_checkpoints_refuse_states_they_could_not_load(tmp_path):
    """A state that could not be loaded again is refused when it is saved."""
    checkpoints, _ = opened(tmp_path)
    with pytest.raises(TrainingError, match=r"state at step 5 could not be loaded again: .* pathlib\.PosixPath"):
        checkpoints.save({"config": [{"folder": tmp_path}], "weight": torch.zeros(3)}, 5)
    assert names(tmp_path) == []


def test_checkpoints_report_when_none_is_intact(tmp_path):
    """When no checkpoint is intact, nothing is changed and the error explains what to do."""
    saved(tmp_path, 1, 2)
    truncated = tmp_path / "step-00000001.pt"
    os.truncate(truncated, 100)
    (tmp_path / "step-00000002.pt").unlink()
    before = contents(tmp_path)
    checkpoints, said = opened(tmp_path)
    with pytest.raises(TrainingError) as error:
        checkpoints.load_latest()
    assert str(error.value).startswith(f"no checkpoint in '{tmp_path}' is intact: '{tmp_path}/step-00000002.pt' is")
    assert f"'{truncated}' is damaged (100 bytes in place of" in str(error.value)
    assert str(error.value).endswith("put a good copy in place, or delete the folder to start anew")
    assert len(said) == 1
    assert contents(tmp_path) == before


scores = st.lists(st.none() | st.sampled_from([0.5, 1.0, 2.0, math.nan, math.inf]), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(scores=scores, keep=st.integers(1, 3))
def test_checkpoints_keep_the_latest_and_the_best(scores, keep):
    """The latest checkpoints and the one with the best score are kept."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, said = opened(Path(folder), keep=keep)
        for step, score in enumerate(scores):
            checkpoints.save({"step": step}, step, score)
        finite = [(s, -step) for step, s in enumerate(scores) if s is not None and math.isfinite(s)]
        kept = {-min(finite)[1]} if finite else set()
        kept |= set(range(max(0, len(scores) - keep), len(scores)))
        expected = [(step, s if s is not None and math.isfinite(s) else None) for step, s in enumerate(scores)]
        assert checkpoints.list() == [Saved(step=step, score=s) for step, s in expected if step in kept]
        assert len(names(Path(folder))) == 2 * len(kept)
        assert checkpoints.load_latest() == {"step": len(scores) - 1}
        assert not said


def test_checkpoints_keep_the_one_just_saved(tmp_path):
    """The checkpoint just saved is kept even if others have later steps."""
    saved(tmp_path, 10, 20)
    checkpoints, _ = opened(tmp_path, keep=1)
    checkpoints.save(state(5), 5)
    assert [one.step for one in checkpoints.list()] == [5, 20]


def test_checkpoints_replace_a_step_saved_again(tmp_path):
    """A step that is saved again replaces the first checkpoint of that step."""
    checkpoints, _ = opened(tmp_path, keep=1)
    for score in (0.1, 0.3, 0.2):
        checkpoints.save({"score": score}, 1, score)
        assert checkpoints.load_latest() == {"score": score}
        assert checkpoints.list() == [Saved(step=1, score=score)]
        assert len(names(tmp_path)) == 2


def test_checkpoints_remove_only_their_own_leftovers(tmp_path):
    """The next save removes unfinished files and leaves other files alone."""
    left = ["step-00000001.pt", "step-00000002.again.pt", ".step-00000003.pt.0123456789abcdef0123456789abcdef.tmp"]
    foreign = ["log.jsonl", "step-1.pt", "step-00000001.pt.txt"]
    for name in left + foreign:
        (tmp_path / name).write_text("x")
    checkpoints, said = opened(tmp_path)
    assert checkpoints.list() == []
    assert checkpoints.load_latest() is None
    checkpoints.save(state(4), 4)
    assert names(tmp_path) == sorted(["step-00000004.json", "step-00000004.pt", *foreign])
    assert not said


def test_checkpoints_report_what_cannot_be_removed(tmp_path):
    """A file that cannot be removed is reported, and the others are removed."""
    saved(tmp_path, 1, 2)
    stuck = tmp_path / "step-00000000.pt"
    (stuck / "a folder").mkdir(parents=True)  # which root cannot remove as a file, either
    checkpoints, said = opened(tmp_path, keep=1)
    checkpoints.save(state(3), 3)
    assert names(tmp_path) == [stuck.name, "step-00000003.json", "step-00000003.pt"]
    assert all(sentence.startswith(f"'{stuck}' cannot be removed: ") for sentence in said)
    assert said


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
