"""Tars are read in order, and damage in them is reported."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from inputs import COUNT, IMAGES, read_everything, stored_plan, write_tar


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_tars_are_read_sample_by_sample(tmp_path: Path, suffix: str, mode: str) -> None:
    """A tar is read in order, one row per sample, with the text beside the image as kept columns."""
    write_tar(tmp_path / f"a{suffix}", mode)
    plan = stored_plan(str(tmp_path), tmp_path / "out", keep=["txt", "json"])
    ids, data, errors, kept = read_everything(plan)
    label = f"a{suffix}/part/"
    expected = [label + (f"{i:03}.png" if i == 3 else f"{i:03}.jpg") for i in range(COUNT)]
    assert ids == [*expected, f"{label}lonely", f"{label}000.jpg#2"]
    assert data == [*IMAGES, None, IMAGES[0]]
    assert errors[COUNT] == "there is no image beside lonely.json" or "no image" in str(errors[COUNT])
    assert kept[0] == [*(f"caption {i}" for i in range(COUNT)), None, None]
    assert kept[1][:2] == ['{"n": 0}', '{"n": 1}']
    assert (plan.images, plan.shards) == (None, 1)


def test_tars_that_are_cut_end_with_an_error(tmp_path: Path) -> None:
    """A tar that is cut gives the images before the cut and one row with an error."""
    whole = write_tar(tmp_path / "whole.tar").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cut.tar").write_bytes(whole[: len(whole) // 2])
    ids, data, errors, _ = read_everything(stored_plan(str(tmp_path / "in"), tmp_path / "out"))
    assert ids[-1] == "cut.tar#end"
    assert "ends too early" in str(errors[-1])
    assert 1 <= len([d for d in data if d is not None]) < COUNT
    assert data[0] == IMAGES[0]


def tar_of(path: Path, *members: tuple[str, bytes]) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_tars_report_a_damaged_header(tmp_path: Path, damage: str) -> None:
    """A damaged header in a tar is reported and not taken for the end of the tar."""
    whole = bytearray(tar_of(tmp_path / "a.tar", *((f"{i}.png", IMAGES[i][:400]) for i in range(3))))
    second = 512 + 512  # after the first header and its file
    if damage == "flip":
        whole[second + 150] ^= 1  # in the checksum
    (tmp_path / "a.tar").write_bytes(whole if damage == "flip" else whole[: second + 300])
    ids, _, errors, _ = read_everything(stored_plan(str(tmp_path / "a.tar"), tmp_path / "out"))
    assert ids == ["a.tar/0.png", "a.tar#end"]
    assert "header" in str(errors[-1]) or "unexpected end" in str(errors[-1])


def test_tars_give_every_member_an_id(tmp_path: Path) -> None:
    """Images that share a key, repeated names, odd names and links in a tar all become rows."""
    members = [(name, IMAGES[0]) for name in ("a.png", "a.jpg", "b.png", "b.png", "caf\udce9.png")]
    tar_of(tmp_path / "a.tar", *members)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
    ids, data, errors, _ = read_everything(stored_plan(str(tmp_path / "a.tar"), tmp_path / "out"))
    names = ["a.png", "a.jpg", "b.png", "b.png#2", "caf%E9.png", "c.png"]
    assert ids == [f"a.tar/{name}" for name in names]
    assert data == [IMAGES[0]] * 5 + [None]
    assert errors[-1] == "it is a link to a.png"
