"""Text, CSV and JSON lists: columns, types and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from inputs import COUNT, IMAGES, formatted, read_everything, stored_plan

from jobs.sources.records import InputError
from jobs.storage.path import parse_uri


@pytest.mark.parametrize("separator", [",", "\t"])
def test_lists_keep_the_types_of_columns(photos: Path, tmp_path: Path, separator: str) -> None:
    """A CSV or TSV list keeps numbers as numbers, quoted text whole and ids as text."""
    lines = [separator.join(("key", "image", "score", "caption"))]
    lines += [separator.join((f"00{i}", f"files/{i}.jpg", f"{i / 2}", f'"a ""{i}"",\n two"')) for i in range(COUNT)]
    path = photos / ("l.csv" if separator == "," else "l.tsv")
    path.write_text("\n".join(lines) + "\n")
    plan = stored_plan(str(path), tmp_path, id_column="key", keep=["score", "caption"])
    ids, data, _, kept = read_everything(plan)
    assert ids == formatted("00{}"), "an id that looks like a number keeps its zeros"
    assert data == IMAGES
    assert kept == [[i / 2 for i in range(COUNT)], [f'a "{i}",\n two' for i in range(COUNT)]]


def test_lists_on_s3_name_relative_and_absolute_objects(bucket: Any, tmp_path: Path) -> None:
    """A list on S3 names objects beside it and objects by URI."""
    query, _, _ = bucket
    folder = parse_uri(f"s3://photos/forms?{query}")
    for i, data in enumerate(IMAGES):
        (folder / "files" / f"{i}.jpg").write(data)
    lines = ["files/0.jpg", "s3://photos/forms/files/1.jpg", f"s3://photos/forms/files/2.jpg?{query}", "files/no.jpg"]
    (folder / "list.txt").write("\n".join(lines).encode())
    ids, data, errors, _ = read_everything(stored_plan(f"s3://photos/forms/list.txt?{query}", tmp_path))
    assert ids == lines
    assert data == [*IMAGES[:3], None]
    assert "cannot be read" in str(errors[3])


def test_lists_refuse_what_cannot_be_used(photos: Path, tmp_path: Path) -> None:
    """Lists that are empty, malformed, without the column or with repeated ids are refused."""
    cases = {
        "empty.txt": ("", "is empty"),
        "a.csv": ("url,caption\nx.jpg,y\n", "no column 'image'; it has url, caption"),
        "b.jsonl": ('{"image": "x.jpg"}\n{"image": ', "cannot be read as a list"),
        "c.csv": ("image\nx.jpg\nx.jpg\ny.jpg\n", "1 of column 'image' are given more than once, such as 'x.jpg'"),
        "d.csv": ("image,a\nx.jpg\ny.jpg,1,2\n", "cannot be read as a list"),
    }
    for name, (text, expected) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=expected):
            stored_plan(str(tmp_path / name), tmp_path / "out" / name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.txt").write_text("not a list")
    with pytest.raises(InputError, match=r"a list .* must be named directly"):
        stored_plan(str(tmp_path / "folder"), tmp_path / "out")


def test_lists_do_not_convert_words(tmp_path: Path) -> None:
    """Words such as NA, null and dates stay text."""
    (tmp_path / "a.csv").write_text('image,c\n"NA",NA\nb,null\nc,"nan"\nd,\n')
    ids, _, _, kept = read_everything(stored_plan(str(tmp_path / "a.csv"), tmp_path / "1", keep=["c"]))
    assert ids == ["NA", "b", "c", "d"]
    assert kept == [["NA", "null", "nan", None]]
    lines = [json.dumps({"image": "x", "id": f"2024-01-0{i}", "m": {"at": f"2024-01-0{i}"}}) for i in (1, 2)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    ids, _, _, kept = read_everything(
        stored_plan(str(tmp_path / "b.jsonl"), tmp_path / "2", id_column="id", keep=["m"])
    )
    assert ids == ["2024-01-01", "2024-01-02"]
    assert kept == [[{"at": "2024-01-01"}, {"at": "2024-01-02"}]]


def test_lists_ignore_other_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that are not used may change their type within a list."""
    monkeypatch.setattr("jobs.sources.lists.BLOCK_BYTES", 1000)
    rows = 200
    (tmp_path / "a.csv").write_text("image,zip\n" + "".join(f"{i}.jpg,{i}\n" for i in range(rows)) + "last.jpg,ABC\n")
    assert len(read_everything(stored_plan(str(tmp_path / "a.csv"), tmp_path / "1", 1000))[0]) == rows + 1
    lines = [json.dumps({"image": f"{i}.jpg", "k": None}) for i in range(rows)]
    lines.append(json.dumps({"image": "last.jpg", "new": 1, "k": "text"}))
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    _, _, _, kept = read_everything(stored_plan(str(tmp_path / "b.jsonl"), tmp_path / "2", 1000, keep=["k"]))
    assert kept[0][-2:] == [None, "text"]
