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


def test_weights_in_fp32_are_mapped_so_that_processes_share_them(folder):
    """Weights in fp32 are mapped so that processes share them."""
    loaded = load_weights(folder)
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in maps if line.endswith(str(folder / "model.safetensors"))]
    (where,) = [(int(start, 16), int(end, 16)) for start, end in spans]
    assert all(where[0] <= tensor.data_ptr() < where[1] for tensor in loaded.model.parameters())


def test_weights_come_back_bit_by_bit(folder):
    """Weights come back bit by bit."""
    loaded = load_weights(folder)
    state = loaded.model.state_dict()
    assert state.keys() == model().state_dict().keys()
    for name, tensor in model().state_dict().items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], tensor), name
    assert torch.equal(loaded.model.halting_KG, model().halting_KG)  # not stored, made again
    assert (loaded.model.config, loaded.provenance, loaded.folder) == (TINY, PROVENANCE, folder)


def test_weights_loaded_give_the_same_tokens_and_train(folder):
    """Loaded weights give the same tokens and can be trained further."""
    loaded = load_weights(folder).model
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.encode(images, "l1:0.2").tokens, model().encode(images, "l1:0.2").tokens)
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())


def test_weights_half_precision_on_disk_loads_as_single(tmp_path):
    """Half precision on disk loads as single."""
    save_weights(tmp_path / "half", model(), provenance={}, dtype=torch.float16)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for name, tensor in load_weights(tmp_path / "half").model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model().state_dict()[name].half().float())


def test_weights_folder_is_its_two_files_readable_by_all(folder):
    """A folder is its two files readable by all."""
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
    assert os.listdir(folder.parent) == ["weights"]


# ---------------------------------------------------------------- the fingerprint


def test_weights_fingerprint_is_of_the_content_wherever_it_lies(tmp_path, folder):
    """The fingerprint is of the content wherever the network lies."""
    mark = fingerprint(folder)
    assert re.fullmatch("[0-9a-f]{64}", mark)
    assert save_weights(tmp_path / "again", model(), provenance=PROVENANCE) == mark
    assert load_weights(folder).fingerprint == load_weights(tmp_path / "again").fingerprint == mark


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_weights_fingerprint_changes_with_either_file(folder, name):
    """The fingerprint changes with either file."""
    before, data = fingerprint(folder), bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)
    assert fingerprint(folder) != before


def test_weights_fingerprint_knows_which_file_a_byte_belongs_to(tmp_path):
    """The fingerprint knows which file a byte belongs to."""
    marks = set()
    for config in (b"", b"a", b"ab"):
        (tmp_path / "config.json").write_bytes(config)
        (tmp_path / "model.safetensors").write_bytes(b"ab"[len(config) :])
        marks.add(fingerprint(tmp_path))
    assert len(marks) == 3


# ---------------------------------------------------------------- what is refused


def test_weights_missing_folder_is_named(tmp_path):
    """A missing folder is named."""
    said = sentence(tmp_path / "nowhere")
    assert f"no weights in {str(tmp_path / 'nowhere')!r}" in said
    assert "a weights folder holds config.json and model.safetensors" in said


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_weights_missing_file_is_named(folder, name):
    """A missing file is named."""
    (folder / name).unlink()
    assert f"{name} cannot be read (No such file or directory)" in sentence(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_weights_folder_in_place_of_a_file_is_refused(folder, name):
    """A folder in place of a file is refused."""
    (folder / name).unlink()
    (folder / name).mkdir()
    assert f"{name} cannot be read" in sentence(folder)


def test_weights_that_were_cut_short_are_refused(folder):
    """Weights that were cut short are refused."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for offset in (0, 1, 7, 8, 9, 8 + header // 2, 8 + header, 9 + header, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:offset])
        assert f"{str(path)!r} is not a complete safetensors file" in sentence(folder)


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\n", b"<html>404</html>" * 9, b"\xff" * 64]
)
def test_weights_something_else_in_place_of_weights_is_refused(folder, content):
    """Something else in place of weights is refused."""
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


def test_weights_loading_executes_no_code(tmp_path, folder):
    """Loading executes no code."""
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


def test_weights_default_criterion_that_names_code_is_refused(tmp_path, folder, monkeypatch):
    """A default criterion that names code is refused."""
    (tmp_path / "alit_stranger.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    change_config(folder, model=TINY.to_json() | {"criterion": "alit_stranger:f@1"})
    assert "config.json' cannot be used: criterion 'alit_stranger:f@1' is not known" in sentence(folder)


@pytest.mark.parametrize("criterion", ["fixed:3", "l1:13", "nonsense"])
def test_weights_refuse_a_criterion_the_model_cannot_follow(folder, criterion):
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
def test_weights_config_that_is_none_is_refused(folder, content, expected):
    """A config that is none is refused."""
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
def test_weights_config_with_a_wrong_field_is_refused_naming_it(folder, fields, expected):
    """A config with a wrong field is refused naming the network."""
    change_config(folder, **fields)
    said = sentence(folder)
    assert str(folder / "config.json") in said
    assert expected in said


def test_weights_config_without_a_model_is_refused(folder):
    """A config without a model is refused."""
    data = json.loads((folder / "config.json").read_text())
    del data["model"]
    (folder / "config.json").write_text(json.dumps(data))
    assert "config.json' has no 'model'" in sentence(folder)


def test_weights_refuse_tensors_that_do_not_fit_the_config(folder):
    """Tensors that do not fit the config are refused naming one."""
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


def test_weights_saving_replaces_weights(folder):
    """Saving replaces weights."""
    mark = save_weights(folder, other_model(), provenance={})
    assert fingerprint(folder) == mark == load_weights(folder).fingerprint
    assert os.listdir(folder.parent) == ["weights"]


def test_weights_empty_folder_is_filled(tmp_path):
    """An empty folder is filled."""
    (tmp_path / "empty").mkdir()
    save_weights(tmp_path / "empty", model(), provenance={})
    load_weights(tmp_path / "empty")


@pytest.mark.parametrize("config", [None, "not json", "[]", '{"model_type": "vit"}'])
def test_save_weights_overwrites_no_other_folder(tmp_path, config):
    """A folder that is something else is not overwritten."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    if config is not None:
        (tmp_path / "mine" / "config.json").write_text(config)
    with pytest.raises(WeightsError, match="mine' exists and is not a weights folder; name another or remove it"):
        save_weights(tmp_path / "mine", model(), provenance={})
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["mine"]


def test_weights_file_is_not_overwritten(tmp_path):
    """A file is not overwritten."""
    (tmp_path / "mine").write_text("years of work")
    with pytest.raises(WeightsError, match="mine' exists and is not a weights folder"):
        save_weights(tmp_path / "mine", model(), provenance={})
    assert (tmp_path / "mine").read_text() == "years of work"


@pytest.mark.parametrize("step", ["save_file", "fingerprint"])
def test_weights_save_that_is_interrupted_leaves_the_old_weights(folder, monkeypatch, step):
    """A save that is interrupted leaves the old weights."""
    before = fingerprint(folder)

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_weights(folder, other_model(), provenance={})
    assert fingerprint(folder) == before
    assert os.listdir(folder.parent) == ["weights"]


def test_save_weights_interrupted_leaves_nothing(tmp_path, monkeypatch):
    """A save that is interrupted leaves nothing where nothing was."""

    def interrupted(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_file", interrupted)
    with pytest.raises(OSError, match="No space left"):
        save_weights(tmp_path / "weights", model(), provenance={})
    assert os.listdir(tmp_path) == []
