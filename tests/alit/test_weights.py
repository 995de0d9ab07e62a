"""A weights folder is read whole or refused with a sentence, and written whole or not at all."""

import copy
import dataclasses
import json
import os
import pickle
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SMALLEST

from alit import weights as module
from alit.errors import WeightsError
from alit.tokenizer import Alit
from alit.weights import fingerprint, load_weights, save_weights

TINY = dataclasses.replace(SMALLEST, halting="sampled")
PROVENANCE = {"steps": 3, "data": ["a", "b"]}


@cache
def model() -> Alit:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Alit(TINY).eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    save_weights(tmp_path / "weights", model(), provenance=PROVENANCE)
    return tmp_path / "weights"


def sentence(folder: Path) -> str:
    with pytest.raises(WeightsError) as error:
        load_weights(folder)
    return str(error.value)


# ---------------------------------------------------------------- there and back


def test_load_weights_maps_float32_files(folder):
    """Weights in float32 are mapped into memory, so that processes share them."""
    loaded = load_weights(folder)
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in maps if line.endswith(str(folder / "model.safetensors"))]
    (where,) = [(int(start, 16), int(end, 16)) for start, end in spans]
    assert all(where[0] <= tensor.data_ptr() < where[1] for tensor in loaded.model.parameters())


def test_weights_survive_saving_bitwise(folder):
    """Every tensor, the config and the provenance are loaded as they were saved."""
    loaded = load_weights(folder)
    state = loaded.model.state_dict()
    assert state.keys() == model().state_dict().keys()
    for name, tensor in model().state_dict().items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], tensor), name
    assert torch.equal(loaded.model.halting_KG, model().halting_KG)  # not stored, made again
    assert (loaded.model.config, loaded.provenance, loaded.folder) == (TINY, PROVENANCE, folder)


def test_loaded_model_encodes_and_can_be_trained(folder):
    """A loaded model gives the same tokens, is in eval mode, and its parameters can be trained."""
    loaded = load_weights(folder).model
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.encode(images, "l1:0.2").tokens, model().encode(images, "l1:0.2").tokens)
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())


def test_half_precision_files_load_as_float32(tmp_path):
    """Weights that were saved in half precision are loaded as float32."""
    save_weights(tmp_path / "half", model(), provenance={}, dtype=torch.float16)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for name, tensor in load_weights(tmp_path / "half").model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model().state_dict()[name].half().float())


def test_save_weights_writes_two_readable_files(folder):
    """A weights folder has two files that everybody may read, and nothing lies beside it."""
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
    assert os.listdir(folder.parent) == ["weights"]


# ---------------------------------------------------------------- the fingerprint


def test_fingerprint_depends_on_content_only(tmp_path, folder):
    """Equal weights have the same fingerprint, whatever the folder."""
    mark = fingerprint(folder)
    assert re.fullmatch("[0-9a-f]{64}", mark)
    assert save_weights(tmp_path / "again", model(), provenance=PROVENANCE) == mark
    assert load_weights(folder).fingerprint == load_weights(tmp_path / "again").fingerprint == mark


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_fingerprint_covers_both_files(folder, name):
    """One changed byte in either file changes the fingerprint."""
    before, data = fingerprint(folder), bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)
    assert fingerprint(folder) != before


def test_fingerprint_separates_the_files(tmp_path):
    """A byte that moves from one file to the other changes the fingerprint."""
    marks = set()
    for config in (b"", b"a", b"ab"):
        (tmp_path / "config.json").write_bytes(config)
        (tmp_path / "model.safetensors").write_bytes(b"ab"[len(config) :])
        marks.add(fingerprint(tmp_path))
    assert len(marks) == 3


# ---------------------------------------------------------------- what is refused


def test_load_weights_names_a_missing_folder(tmp_path):
    """A folder that is missing is named, with the files that it should hold."""
    said = sentence(tmp_path / "nowhere")
    assert f"no weights in {str(tmp_path / 'nowhere')!r}" in said
    assert "a weights folder holds config.json and model.safetensors" in said


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_load_weights_names_a_missing_file(folder, name):
    """A file that is missing is named, with the system's reason."""
    (folder / name).unlink()
    assert f"{name} cannot be read (No such file or directory)" in sentence(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_load_weights_refuses_folders_as_files(folder, name):
    """A folder in place of one of the two files is refused."""
    (folder / name).unlink()
    (folder / name).mkdir()
    assert f"{name} cannot be read" in sentence(folder)


def test_load_weights_refuses_truncated_files(folder):
    """Weights that end anywhere before their last byte are refused."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for offset in (0, 1, 7, 8, 9, 8 + header // 2, 8 + header, 9 + header, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:offset])
        assert f"{str(path)!r} is not a complete safetensors file" in sentence(folder)


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\n", b"<html>404</html>" * 9, b"\xff" * 64]
)
def test_load_weights_refuses_other_files(folder, content):
    """A Git LFS pointer, a web page or noise in place of the weights is refused with advice to download again."""
    (folder / "model.safetensors").write_bytes(content)
    said = sentence(folder)
    assert "model.safetensors' is not a complete safetensors file" in said
    assert "download it again" in said


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_load_weights_executes_no_code(tmp_path, folder):
    """A pickle in place of the weights is refused without running it."""
    trap, sprung = Trap(tmp_path / "sprung"), tmp_path / "sprung"
    pickle.loads(pickle.dumps(trap))
    assert sprung.exists(), "the trap works"
    sprung.rmdir()
    (folder / "model.safetensors").write_bytes(pickle.dumps(trap))
    assert "not a complete safetensors file" in sentence(folder)
    torch.save({"model": trap}, folder / "model.safetensors")
    assert "not a complete safetensors file" in sentence(folder)
    assert not sprung.exists()


def change_config(folder: Path, **fields: object) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | fields))


def test_load_weights_refuses_criteria_with_code(tmp_path, folder, monkeypatch):
    """A default criterion that names a function is refused, and its module is not imported."""
    (tmp_path / "alit_stranger.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    change_config(folder, model=TINY.to_json() | {"criterion": "alit_stranger:f@1"})
    assert "config.json' cannot be used: criterion 'alit_stranger:f@1' is not known" in sentence(folder)


@pytest.mark.parametrize("criterion", ["fixed:3", "l1:13", "nonsense"])
def test_load_weights_refuses_unsupported_criteria(folder, criterion):
    """A default criterion that the model cannot follow is refused."""
    change_config(folder, model=TINY.to_json() | {"criterion": criterion})
    assert f"config.json' cannot be used: criterion {criterion!r}" in sentence(folder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot be used"),
        (b"{", "cannot be used"),
        (b"\xff\xfe", "cannot be used"),
        (b"[" * 100_000, "cannot be used"),
        (b"[]", "has format None; this version reads format 1"),
        (b"{}", "has format None; this version reads format 1"),
        (b'{"format": 2}', "has format 2; this version reads format 1"),
        (b'{"format": 1}', "asks for preprocessing that this version does not support"),
        (b" " * ((1 << 20) + 1), "is larger than 1048576 bytes"),
    ],
)
def test_load_weights_refuses_damaged_configs(folder, content, expected):
    """A config that is no JSON, of another format or enormous is refused with the path."""
    (folder / "config.json").write_bytes(content)
    said = sentence(folder)
    assert f"{str(folder / 'config.json')!r} {expected}" in said


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"preprocessing": {"resize": "nearest"}}, "asks for preprocessing that this version does not support"),
        ({"model": TINY.to_json() | {"colour": "red"}}, "cannot be used: config has unknown field 'colour'"),
        ({"model": TINY.to_json() | {"image_size": 9}}, "image_size must be a multiple of 2, got 9"),
        ({"model": []}, "cannot be used: a model config must be an object, got []"),
        ({"model": {"base": {"kind": {}}}}, "base kind must be one of ['kl', 'vqgan'], got {}"),
        ({"provenance": "a friend"}, "has a provenance that is not an object: 'a friend'"),
    ],
)
@pytest.mark.unchecked
def test_load_weights_names_wrong_fields(folder, fields, expected):
    """A config with an impossible or unknown field is refused with the field and its value."""
    change_config(folder, **fields)
    said = sentence(folder)
    assert str(folder / "config.json") in said
    assert expected in said


def test_load_weights_refuses_configs_without_model(folder):
    """A config without a model is refused."""
    data = json.loads((folder / "config.json").read_text())
    del data["model"]
    (folder / "config.json").write_text(json.dumps(data))
    assert "config.json' has no 'model'" in sentence(folder)


def test_load_weights_names_tensors_that_do_not_fit(folder):
    """A tensor that is missing, unknown or of another shape than the config's is named."""
    path, name = folder / "model.safetensors", "encoder.to_code.weight"
    whole = load_file(path)
    assert whole[name].shape == (4, 16)
    wrong = {
        f"tensor {name!r} is missing": {n: t for n, t in whole.items() if n != name},
        f"tensor {name!r} has the shape (5, 16), the config asks for (4, 16)": whole | {name: torch.zeros(5, 16)},
        "it has an unknown tensor 'optimizer.step'": whole | {"optimizer.step": torch.zeros(1)},
    }
    for expected, tensors in wrong.items():
        save_file(tensors, path)
        assert f"{str(path)!r} does not fit its config: {expected}" in sentence(folder)


# ---------------------------------------------------------------- writing over what is there


@torch.no_grad()
def other_model() -> Alit:
    other = copy.deepcopy(model())
    other.encoder.mask_token += 1
    return other


def test_save_weights_replaces_weights(folder):
    """Saving over a weights folder replaces it."""
    mark = save_weights(folder, other_model(), provenance={})
    assert fingerprint(folder) == mark == load_weights(folder).fingerprint
    assert os.listdir(folder.parent) == ["weights"]


def test_save_weights_fills_an_empty_folder(tmp_path):
    """Saving into an empty folder works."""
    (tmp_path / "empty").mkdir()
    save_weights(tmp_path / "empty", model(), provenance={})
    load_weights(tmp_path / "empty")


@pytest.mark.parametrize("config", [None, "not json", "[]", '{"model_type": "vit"}'])
def test_save_weights_overwrites_no_other_folder(tmp_path, config):
    """A folder that holds something else is refused and stays as it is."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    if config is not None:
        (tmp_path / "mine" / "config.json").write_text(config)
    with pytest.raises(WeightsError, match="mine' exists and is not a weights folder; name another or remove it"):
        save_weights(tmp_path / "mine", model(), provenance={})
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["mine"]


def test_save_weights_overwrites_no_file(tmp_path):
    """A file in place of the folder is refused and stays as it is."""
    (tmp_path / "mine").write_text("years of work")
    with pytest.raises(WeightsError, match="mine' exists and is not a weights folder"):
        save_weights(tmp_path / "mine", model(), provenance={})
    assert (tmp_path / "mine").read_text() == "years of work"


@pytest.mark.parametrize("step", ["save_file", "fingerprint"])
def test_interrupted_save_keeps_the_old_weights(folder, monkeypatch, step):
    """A save that is interrupted leaves the weights that were there, and no other file."""
    before = fingerprint(folder)

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_weights(folder, other_model(), provenance={})
    assert fingerprint(folder) == before
    assert os.listdir(folder.parent) == ["weights"]


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    """A save that fails leaves nothing where nothing was."""

    def interrupted(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_file", interrupted)
    with pytest.raises(OSError, match="No space left"):
        save_weights(tmp_path / "weights", model(), provenance={})
    assert os.listdir(tmp_path) == []
