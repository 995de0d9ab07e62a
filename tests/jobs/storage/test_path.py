"""Files and folders on local disks and other filesystems."""

from pathlib import Path

import pytest

from jobs.storage.path import parse_uri
from jobs.storage.retry import StorageError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_path_write_replaces_the_whole_file(tmp_path: Path) -> None:
    """Writing creates the folders and replaces an existing file as a whole."""
    target = parse_uri(str(tmp_path)) / "a" / "b.bin"
    assert not target.exists()
    target.write(b"first, and longer")
    target.write(b"second")
    assert target.read() == b"second"
    assert contents(tmp_path) == {"a/b.bin": b"second"}


def test_path_hides_and_removes_unfinished_files(tmp_path: Path) -> None:
    """Temporary files of a killed writer are not listed and can be removed."""
    orphan = tmp_path / f".00000000.parquet.{'0a' * 16}.tmp"
    for path in (orphan, tmp_path / "00000001.parquet", tmp_path / ".mine.tmp"):
        path.write_bytes(b"")
    assert parse_uri(str(tmp_path)).names() == [".mine.tmp", "00000001.parquet"]
    parse_uri(str(tmp_path)).remove_unfinished()
    assert sorted(contents(tmp_path)) == [".mine.tmp", "00000001.parquet"]
    parse_uri(str(tmp_path / "nowhere")).remove_unfinished()


def test_path_reports_what_cannot_be_used(tmp_path: Path) -> None:
    """Paths that cannot be written or listed are reported, and a missing folder is empty."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/a' cannot be written: "):
        (parse_uri(str(tmp_path / "file")) / "a").write(b"")
    with pytest.raises(StorageError, match="cannot be listed as a folder"):
        parse_uri(str(tmp_path / "file")).names()
    assert parse_uri(str(tmp_path / "nowhere")).names() == []


@pytest.mark.parametrize("uri", ["", "nonsense://a/b"])
def test_parse_uri_refuses_unknown_kinds(uri: str) -> None:
    """An empty URI and one with an unknown scheme are refused."""
    with pytest.raises(StorageError):
        parse_uri(uri)


def test_path_uses_other_filesystems(tmp_path: Path) -> None:
    """A path on another filesystem is written and read through that filesystem."""
    elsewhere = parse_uri("memory://somewhere/a.bin")
    assert not elsewhere.local
    elsewhere.write(b"bytes")
    assert elsewhere.read() == b"bytes"
    assert contents(tmp_path) == {}
