"""What a folder, a glob or a URI names, under which ids, and what is refused."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import (
    COUNT,
    IMAGES,
    as_table,
    data_by_id,
    formatted,
    plan_of,
    read_everything,
    refusal,
    stored_plan,
    write_files,
)

from jobs.sources.records import InputError
from jobs.storage.path import parse_uri

NOT_UTF8 = b"caf\xe9 100%.jpg"


def test_listing_of_a_folder_gives_relative_paths(tmp_path: Path) -> None:
    """A folder gives its image files at any depth, with their relative paths as ids."""
    write_files(tmp_path, "b.JPG", "a/1.png", "a/deep/2.jpeg", "a/note.txt", "x.jpg/inside.webp")
    found = data_by_id(plan_of(tmp_path))
    assert found == {n: n.encode() for n in ("b.JPG", "a/1.png", "a/deep/2.jpeg", "x.jpg/inside.webp")}


@pytest.mark.parametrize("form", ["{}/", "{}/../in", "file://{}"])
def test_listing_accepts_other_forms_of_a_path(tmp_path: Path, form: str) -> None:
    """A trailing slash, a path through the parent and a file URI name the same folder."""
    write_files(tmp_path / "in", "a.jpg", "b/c.jpg")
    assert plan_of(form.format(tmp_path / "in")) == plan_of(tmp_path / "in")


def test_listing_resolves_relative_folders_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder is resolved against the working folder at the time of planning."""
    write_files(tmp_path / "in", "a.jpg")
    monkeypatch.chdir(tmp_path)
    plan = plan_of("in")
    monkeypatch.chdir("/")
    assert data_by_id(plan) == {"a.jpg": b"a.jpg"}


def test_listing_skips_hidden_files(tmp_path: Path) -> None:
    """Hidden files and folders are skipped."""
    write_files(tmp_path, "a.jpg", ".b.jpg", ".thumbs/c.jpg", "d/.e.jpg")
    assert set(data_by_id(plan_of(tmp_path))) == {"a.jpg"}
    assert set(data_by_id(plan_of(f"file://{tmp_path}"))) == {"a.jpg"}


def test_listing_of_a_glob_gives_ids_below_its_fixed_part(tmp_path: Path) -> None:
    """A glob gives ids that are relative to its part without wildcards."""
    write_files(tmp_path, "a/1.jpg", "b/2.jpg", "b/3.png", "b/deep/4.jpg")
    assert data_by_id(plan_of(tmp_path / "*" / "*.jpg")) == {"a/1.jpg": b"a/1.jpg", "b/2.jpg": b"b/2.jpg"}
    assert set(data_by_id(plan_of(tmp_path / "b" / "**" / "*.jpg"))) == {"2.jpg", "deep/4.jpg"}


def test_listing_takes_wildcards_of_existing_names_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wildcard characters in the name of an existing folder are taken literally."""
    write_files(tmp_path / "[2020] trip*", "1.jpg", "2.jpg")
    monkeypatch.chdir(tmp_path / "[2020] trip*")
    assert set(data_by_id(plan_of("*.jpg"))) == {"1.jpg", "2.jpg"}
    assert set(data_by_id(plan_of(tmp_path / "[2020] trip*"))) == {"1.jpg", "2.jpg"}


def test_listing_escapes_names_that_are_not_utf8(tmp_path: Path) -> None:
    """File names with any bytes become readable ids, and the files can be read."""
    names = ["a b.jpg", "ü/日本.jpg", "new\nline.jpg", "100%.jpg", "quote'\".jpg", "emoji 🎈.png"]
    write_files(tmp_path, *names, NOT_UTF8, b"\xff\xfe/x.jpg")
    expected = {name: name.encode() for name in names} | {
        "caf%E9 100%25.jpg": NOT_UTF8,
        "%FF%FE/x.jpg": b"\xff\xfe/x.jpg",
    }
    assert data_by_id(plan_of(tmp_path)) == data_by_id(plan_of(tmp_path / "**" / "*")) == expected


def test_listing_follows_links_without_cycles(tmp_path: Path) -> None:
    """Links to folders are followed, and cycles end."""
    write_files(tmp_path, "in/a.jpg", "in/b/c.jpg", "elsewhere/d.jpg")
    (tmp_path / "in" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "b" / "over").symlink_to("../../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self").symlink_to("self")
    assert set(data_by_id(plan_of(tmp_path / "in"))) == {"a.jpg", "b/c.jpg", "b/over/d.jpg"}


@pytest.mark.parametrize("uri", ["nowhere", "/nowhere/at/all", "file:///nowhere/at/all"])
def test_listing_refuses_a_missing_input(uri: str) -> None:
    """An input that does not exist is refused."""
    assert "does not exist" in refusal(uri)


def test_listing_refuses_an_empty_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty name is refused and does not mean the working folder."""
    write_files(tmp_path, "a.jpg")
    monkeypatch.chdir(tmp_path)
    assert "the input is empty" in refusal("")


def test_listing_refuses_an_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without read permission is refused, with the system's reason."""
    write_files(tmp_path, "a.jpg")

    def denied(path: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "cannot be listed: Permission denied" in refusal(tmp_path)


def test_listing_of_s3_finds_folders_globs_and_tables(bucket: Any, tmp_path: Path) -> None:
    """Folders, globs and tables on S3 are listed and read as local ones are."""
    query, _, _ = bucket
    folder = parse_uri(f"s3://photos/globs?{query}")
    for i, data in enumerate(IMAGES):
        (folder / f"a{i % 2}" / "deep" / f"{i}.jpg").write(data)
    (folder / ".hidden" / "x.jpg").write(b"")
    listed = read_everything(stored_plan(f"s3://photos/globs?{query}", tmp_path / "1"))
    assert listed[0] == sorted(f"a{i % 2}/deep/{i}.jpg" for i in range(COUNT))
    assert listed[1] == [IMAGES[int(name[-5])] for name in listed[0]]
    some = read_everything(stored_plan(f"s3://photos/globs/a1/*/?.jpg?{query}", tmp_path / "2"))
    assert some[0] == ["deep/1.jpg", "deep/3.jpg", "deep/5.jpg"]
    assert read_everything(stored_plan(f"s3://photos/globs/**/[06].jpg?{query}", tmp_path / "3"))[1] == [
        IMAGES[0],
        IMAGES[6],
    ]
    sink = io.BytesIO()
    pq.write_table(as_table(tmp_path, pa.array(IMAGES, pa.binary())), sink, row_group_size=2)
    (parse_uri(f"s3://photos/tables?{query}") / "t.parquet").write(sink.getvalue())
    assert read_everything(stored_plan(f"s3://photos/tables?{query}", tmp_path / "4", id_column="key"))[:2] == (
        formatted("k{}"),
        IMAGES,
    )


def test_listing_of_a_glob_refuses_unreadable_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A glob ends on cycles and refuses folders that cannot be read."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(IMAGES[0])
    (tmp_path / "a" / "loop").symlink_to("..")
    assert read_everything(stored_plan(str(tmp_path / "**" / "*.png"), tmp_path.parent / "glob-out"))[0] == ["a/x.png"]
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if os.fsencode(path).endswith(b"/a"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match="cannot be listed: Permission denied"):
        stored_plan(str(tmp_path / "*" / "*.png"), tmp_path.parent / "glob-out2")
