"""Files on S3, over a real S3 server."""

from __future__ import annotations

import secrets

import pytest

from jobs.sources.open import make_plan
from jobs.sources.records import InputError
from jobs.storage.path import parse_uri
from jobs.storage.retry import StorageError


def test_s3_file_is_written_read_and_listed(bucket):
    """A file on S3 is written with one request, read back and listed."""
    query, folder, log = bucket
    where = parse_uri(f"s3://photos/some/folder?{query}")
    data, before = secrets.token_bytes(300_000), len(log.read_text())
    (where / "a.bin").write(data)
    assert (where / "a.bin").read() == data
    assert where.names() == ["a.bin"]
    assert (where / "a.bin").exists()
    assert not (where / "b.bin").exists()
    assert (folder / "some" / "folder" / "a.bin").read_bytes() == data
    assert "uploads" not in log.read_text()[before:], "a small file is one PUT, no multipart upload"


def test_s3_reads_an_empty_object_as_no_bytes(bucket):
    """An empty object, of which no range is valid, is read as no bytes, whole or up to a limit."""
    query, _, _ = bucket
    empty = parse_uri(f"s3://photos/empty.jsonl?{query}")
    empty.write(b"")
    assert (empty.read(), empty.read(10)) == (b"", b"")


def test_s3_refuses_a_missing_bucket(bucket):
    """A URI without a bucket and a bucket that does not exist are refused with one sentence."""
    query, _, _ = bucket
    with pytest.raises(StorageError, match="does not name a bucket"):
        parse_uri("s3://")
    with pytest.raises(ValueError, match="does not exist"):
        make_plan(f"s3://absent/in?{query}", rows_per_file=4)


def test_s3_refuses_wrong_options_and_credentials(bucket, monkeypatch):
    """Wrong options and credentials of a URI are refused with one sentence each, without secrets."""
    query, _, _ = bucket
    (parse_uri(f"s3://photos/locked?{query}") / "a.jpg").write(b"")
    for uri, expected in (
        ("s3://key:secret@photos/in", "must not hold credentials"),
        ("s3://photos/in?secret_key=x", "must not hold credentials"),
        ("s3://photos/in?endpint=http://x", "unknown option 'endpint'; valid options: endpoint, region"),
        ("s3://photos/in?timeout=soon", "must be a number of seconds above 0, got 'soon'"),
        ("s3://photos/in?anonymous=yes", "anonymous must be true or false"),
        ("https://photos/in", "is not a folder"),
        ("gopher://photos/in", "cannot be opened: Protocol not known"),
    ):
        with pytest.raises(StorageError, match=expected):
            parse_uri(uri)
    assert "secret" not in repr(parse_uri(f"s3://photos/in?{query}"))
    for changes, words in (
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "denied|signature"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": "/nowhere"},
            "no credentials were found; set AWS",
        ),
    ):
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setenv(name, value)
            uri = f"s3://photos/locked?{query}&timeout={20 + len(changes)}"  # a client of its own
            with pytest.raises(InputError, match=words) as caught:
                make_plan(uri, rows_per_file=4)
            assert "\n" not in str(caught.value)
    assert make_plan(f"s3://photos/locked?{query}", rows_per_file=4).images == 1


def test_s3_upload_is_all_or_nothing(bucket):
    """A file written in pieces appears whole, and not at all when the writer is interrupted."""
    query, folder, _ = bucket
    where = parse_uri(f"s3://photos/pieces?{query}")
    piece = secrets.token_bytes(1 << 20)
    with (where / "large").open_write() as file:
        for _ in range(100):  # past the size at which it waits for the network
            file.write(piece)
    assert (folder / "pieces" / "large").read_bytes() == 100 * piece

    def interrupted(pieces: int) -> None:
        with (where / "interrupted").open_write() as file:
            for _ in range(pieces):
                file.write(piece)
            raise KeyboardInterrupt

    for pieces in (1, 12):  # one PUT, and a multipart upload
        with pytest.raises(KeyboardInterrupt):
            interrupted(pieces)
        assert where.names() == ["large"]
    (where / "large").remove_file()
    (where / "large").remove_file()
    assert where.names() == []
