"""Links are followed to files, web addresses and objects; failures are errors of single rows."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inputs import IMAGES, plan_of, read_everything, read_shards, stored_plan, write_files


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves the folder; some paths misbehave."""

    tries: int = 0

    def do_GET(self) -> None:
        if "flaky" in self.path:
            type(self).tries += 1
            if self.tries < 3:
                self.send_error(503)
                return
            self.path = self.path.replace("flaky", "files")
        if "short" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"only this")
            return
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def web(photos: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=photos)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_fetch_reads_files_and_web_addresses(photos: Path, tmp_path: Path, web: str) -> None:
    """Links to local files and web addresses are followed, and each failure concerns one image."""
    lines = ["files/0.jpg", str(photos / "files" / "1.jpg"), f"file://{photos}/files/2.jpg", f"{web}/files/3.jpg"]
    lines += [f"{web}/flaky/4.jpg", f"{web}/files/gone.jpg", f"{web}/short.jpg", "files/gone.jpg", "ftpx://x/y.jpg"]
    lines += ["http://127.0.0.1:9/closed.jpg"]
    (photos / "plain.txt").write_text("\n".join(lines) + "\n\n")
    ids, data, errors, _ = read_everything(stored_plan(str(photos / "plain.txt"), tmp_path))
    assert ids == lines
    assert data[:5] == IMAGES[:5]
    assert data[5:] == [None] * 5
    assert errors[:5] == [None] * 5
    assert errors[5] == "the web server answers 404 File not found"
    assert "IncompleteRead" in str(errors[6])
    assert "No such file" in str(errors[7])
    assert "ftpx" in str(errors[8])
    assert "refused" in str(errors[9])


def test_fetch_reports_malformed_uris_as_errors(tmp_path: Path, bucket: Any) -> None:
    """Each malformed or unsupported URI in a list becomes a row with an error."""
    query, _, _ = bucket
    lines = [
        f"s3://bad bucket/x.png?{query}",
        "s3://bucket",
        "FILE:///nowhere.png",
        "github://x/y.png",
    ]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    ids, data, errors, _ = read_everything(stored_plan(str(tmp_path / "a.txt"), tmp_path / "out"))
    assert ids == lines
    assert data == [None] * len(lines)
    assert all(errors)
    assert "does not name an object" in str(errors[1])
    assert "No such file" in str(errors[2])


def test_fetch_reports_unreadable_files_as_errors(tmp_path: Path) -> None:
    """Missing files, folders, pipes, devices and broken links become rows with an error, without a hang."""
    write_files(tmp_path, "good.jpg", "gone.jpg", "folder.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    plan = plan_of(tmp_path, 100)
    (tmp_path / "gone.jpg").unlink()
    (tmp_path / "folder.jpg").unlink()
    (tmp_path / "folder.jpg").mkdir()
    (rows,) = read_shards(plan)
    errors = dict(zip(rows.ids, rows.errors, strict=True))
    assert errors.pop("good.jpg") is None
    assert sorted(errors) == ["broken.jpg", "device.jpg", "folder.jpg", "gone.jpg", "loop.jpg", "pipe.jpg"]
    assert all(error is not None and error.startswith("the file cannot be read: ") for error in errors.values())
    assert "not a regular file" in str(errors["pipe.jpg"])
    assert [data for data, error in zip(rows.data, rows.errors, strict=True) if error] == [None] * 6


def test_fetch_reads_one_byte_beyond_the_limit(tmp_path: Path) -> None:
    """Of a file above the size limit, one byte beyond the limit is read."""
    (tmp_path / "a.jpg").write_bytes(b"x" * 5000)
    assert [len(data or b"") for part in read_shards(plan_of(tmp_path), max_bytes=100) for data in part.data] == [101]
