"""Every form of input gives the same pictures: planned, stored, read back and decoded, without Ray."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alit.images.encode import encode_image
from jobs.dataset.plan import StoredPlan, plan_of_record, write_plan
from jobs.dataset.unique_ids import repeated_ids
from jobs.sources.open import open_input
from jobs.sources.read import read_batches, read_rows
from jobs.sources.records import InputError, Plan, Row
from jobs.storage.path import parse_uri

COUNT = 7
LABELS = [{"name": f"label {i}", "boxes": [i, i + 1]} for i in range(COUNT)]


def picture(i: int) -> bytes:
    shade = np.full((20 + i, 30, 3), 10 * i, np.uint8)
    return encode_image(shade, "jpeg" if i % 2 else "png")


PICTURES = [picture(i) for i in range(COUNT)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image files, and beside them everything that names or holds them."""
    folder = tmp_path_factory.mktemp("photos")
    for i, data in enumerate(PICTURES):
        (folder / "files").mkdir(exist_ok=True)
        (folder / "files" / f"{i}.jpg").write_bytes(data)
    return folder


def names(form: str) -> list[str]:
    return [form.format(i) for i in range(COUNT)]


def as_table(folder: Path, images: pa.Array) -> pa.Table:
    return pa.table({"image": images, "key": names("k{}"), "label": LABELS})


def bytes_parquet(folder: Path) -> str:
    pq.write_table(as_table(folder, pa.array(PICTURES, pa.binary())), folder / "t.parquet", row_group_size=2)
    return "t.parquet"


def struct_parquet(folder: Path) -> str:
    cells = [{"bytes": data if i != 3 else None, "path": f"files/{i}.jpg"} for i, data in enumerate(PICTURES)]
    pq.write_table(as_table(folder, pa.array(cells)), folder / "s.parquet")
    return "s.parquet"


def links_parquet(folder: Path) -> str:
    pq.write_table(as_table(folder, pa.array(names("files/{}.jpg"))), folder / "l.parquet")
    return "l.parquet"


def arrow_file(folder: Path) -> str:
    table = as_table(folder, pa.array(PICTURES, pa.large_binary()))
    with pa.ipc.new_file(folder / "f.arrow", table.schema) as file:
        file.write_table(table, 3)
    return "f.arrow"


def arrow_stream(folder: Path) -> str:
    table = as_table(folder, pa.array(PICTURES, pa.binary()))
    with pa.OSFile(str(folder / "s.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as file:
        file.write_table(table, 3)
    return "s.arrow"


def jsonl(folder: Path) -> str:
    lines = [
        json.dumps({"image": f"files/{i}.jpg", "key": f"k{i}", "label": LABELS[i]}, ensure_ascii=False) + "\n"
        for i in range(COUNT)
    ]
    (folder / "list.jsonl").write_text("".join(lines))
    return "list.jsonl"


FORMS: list[Callable[[Path], str]] = [
    bytes_parquet,
    struct_parquet,
    links_parquet,
    arrow_file,
    arrow_stream,
    jsonl,
]


def planned(uri: str, out: Path, rows: int = 3, limit: int | None = None, **options: Any) -> StoredPlan:
    return write_plan(parse_uri(str(out)), open_input(uri, rows_per_file=rows, **options), rows, limit)


def everything(plan: StoredPlan) -> tuple[list[str], list[bytes | None], list[str | None], list[list[Any]]]:
    ids, data, errors, kept = [], [], [], [[] for _ in plan.source.kept]
    with ThreadPoolExecutor(4) as pool:
        for number in range(plan.shards):
            for rows in read_batches(plan.source, plan.shard(number), 2, 10_000, pool):
                ids += rows.ids
                data += rows.data
                errors += rows.errors
                for column, values in zip(kept, rows.kept, strict=True):
                    column += values.to_pylist()
    return ids, data, errors, kept


@pytest.mark.parametrize("form", FORMS)
def test_open_input_reads_every_form_alike(photos: Path, tmp_path: Path, form: Any) -> None:
    """Every form of table and list gives the same images, ids and nested columns."""
    plan = planned(str(photos / form(photos)), tmp_path, id_column="key", keep=["label"])
    ids, data, errors, kept = everything(plan)
    assert ids == names("k{}")
    assert data == PICTURES
    assert errors == [None] * COUNT
    assert kept == [LABELS]
    assert (plan.images, plan.shards) == (COUNT, 3)
    assert plan.source.kept[0].type.field("boxes").type == pa.list_(pa.int64())


@pytest.mark.parametrize("form", [bytes_parquet, arrow_file, links_parquet, jsonl])
def test_read_rows_reads_rows_in_any_order(photos: Path, form: Any) -> None:
    """Single rows of an input are read in any order, repeated ones too."""
    found = open_input(str(photos / form(photos)), rows_per_file=3)
    plan = Plan(source=found.source, shards=tuple(found.shards))
    numbers = [5, 0, 3, 5]
    if plan.source.sliced:
        rows = [Row(plan.shards[0].paths[0], number) for number in numbers]
    else:
        rows = [Row([path for shard in plan.shards for path in shard.paths][number], 0) for number in numbers]
    with ThreadPoolExecutor(4) as pool:
        assert read_rows(plan.source, rows, 10_000, pool).data == [PICTURES[number] for number in numbers]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_lists_keep_the_types_of_columns(photos: Path, tmp_path: Path, separator: str) -> None:
    """A CSV or TSV list keeps numbers as numbers, quoted text whole and ids as text."""
    lines = [separator.join(("key", "image", "score", "caption"))]
    lines += [separator.join((f"00{i}", f"files/{i}.jpg", f"{i / 2}", f'"a ""{i}"",\n two"')) for i in range(COUNT)]
    path = photos / ("l.csv" if separator == "," else "l.tsv")
    path.write_text("\n".join(lines) + "\n")
    plan = planned(str(path), tmp_path, id_column="key", keep=["score", "caption"])
    ids, data, _, kept = everything(plan)
    assert ids == names("00{}"), "an id that looks like a number keeps its zeros"
    assert data == PICTURES
    assert kept == [[i / 2 for i in range(COUNT)], [f'a "{i}",\n two' for i in range(COUNT)]]


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


def test_lists_name_files_and_web_addresses(photos: Path, tmp_path: Path, web: str) -> None:
    """A plain list names local files and web addresses, and each failure concerns one image."""
    lines = ["files/0.jpg", str(photos / "files" / "1.jpg"), f"file://{photos}/files/2.jpg", f"{web}/files/3.jpg"]
    lines += [f"{web}/flaky/4.jpg", f"{web}/files/gone.jpg", f"{web}/short.jpg", "files/gone.jpg", "ftpx://x/y.jpg"]
    lines += ["http://127.0.0.1:9/closed.jpg"]
    (photos / "plain.txt").write_text("\n".join(lines) + "\n\n")
    ids, data, errors, _ = everything(planned(str(photos / "plain.txt"), tmp_path))
    assert ids == lines
    assert data[:5] == PICTURES[:5]
    assert data[5:] == [None] * 5
    assert errors[:5] == [None] * 5
    assert errors[5] == "the web server answers 404 File not found"
    assert "IncompleteRead" in str(errors[6])
    assert "No such file" in str(errors[7])
    assert "ftpx" in str(errors[8])
    assert "refused" in str(errors[9])


def test_lists_on_s3_name_relative_and_absolute_objects(bucket: Any, tmp_path: Path) -> None:
    """A list on S3 names objects beside it and objects by URI."""
    query, _, _ = bucket
    folder = parse_uri(f"s3://photos/forms?{query}")
    for i, data in enumerate(PICTURES):
        (folder / "files" / f"{i}.jpg").write(data)
    lines = ["files/0.jpg", "s3://photos/forms/files/1.jpg", f"s3://photos/forms/files/2.jpg?{query}", "files/no.jpg"]
    (folder / "list.txt").write("\n".join(lines).encode())
    ids, data, errors, _ = everything(planned(f"s3://photos/forms/list.txt?{query}", tmp_path))
    assert ids == lines
    assert data == [*PICTURES[:3], None]
    assert "cannot be read" in str(errors[3])


def test_listing_of_s3_finds_folders_globs_and_tables(bucket: Any, tmp_path: Path) -> None:
    """Folders, globs and tables on S3 are listed and read as local ones are."""
    query, _, _ = bucket
    folder = parse_uri(f"s3://photos/globs?{query}")
    for i, data in enumerate(PICTURES):
        (folder / f"a{i % 2}" / "deep" / f"{i}.jpg").write(data)
    (folder / ".hidden" / "x.jpg").write(b"")
    listed = everything(planned(f"s3://photos/globs?{query}", tmp_path / "1"))
    assert listed[0] == sorted(f"a{i % 2}/deep/{i}.jpg" for i in range(COUNT))
    assert listed[1] == [PICTURES[int(name[-5])] for name in listed[0]]
    some = everything(planned(f"s3://photos/globs/a1/*/?.jpg?{query}", tmp_path / "2"))
    assert some[0] == ["deep/1.jpg", "deep/3.jpg", "deep/5.jpg"]
    assert everything(planned(f"s3://photos/globs/**/[06].jpg?{query}", tmp_path / "3"))[1] == [
        PICTURES[0],
        PICTURES[6],
    ]
    sink = io.BytesIO()
    pq.write_table(as_table(tmp_path, pa.array(PICTURES, pa.binary())), sink, row_group_size=2)
    (parse_uri(f"s3://photos/tables?{query}") / "t.parquet").write(sink.getvalue())
    assert everything(planned(f"s3://photos/tables?{query}", tmp_path / "4", id_column="key"))[:2] == (
        names("k{}"),
        PICTURES,
    )


def make_tar(path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for i, data in enumerate(PICTURES):
            add(f"part/{i:03}.txt", f"caption {i}".encode())
            add(f"part/{i:03}.{'png' if i % 2 else 'seg.jpg'}" if i == 3 else f"part/{i:03}.jpg", data)
            add(f"part/{i:03}.json", json.dumps({"n": i}).encode())
        add("part/lonely.json", b"{}")
        add("part/000.jpg", PICTURES[0])
    return path


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_tars_are_read_sample_by_sample(tmp_path: Path, suffix: str, mode: str) -> None:
    """A tar is read in order, one row per sample, with the text beside the image as kept columns."""
    make_tar(tmp_path / f"a{suffix}", mode)
    plan = planned(str(tmp_path), tmp_path / "out", keep=["txt", "json"])
    ids, data, errors, kept = everything(plan)
    label = f"a{suffix}/part/"
    expected = [label + (f"{i:03}.png" if i == 3 else f"{i:03}.jpg") for i in range(COUNT)]
    assert ids == [*expected, f"{label}lonely", f"{label}000.jpg#2"]
    assert data == [*PICTURES, None, PICTURES[0]]
    assert errors[COUNT] == "there is no image beside lonely.json" or "no image" in str(errors[COUNT])
    assert kept[0] == [*(f"caption {i}" for i in range(COUNT)), None, None]
    assert kept[1][:2] == ['{"n": 0}', '{"n": 1}']
    assert (plan.images, plan.shards) == (None, 1)


def test_tars_that_are_cut_end_with_an_error(tmp_path: Path) -> None:
    """A tar that is cut gives the images before the cut and one row with an error."""
    whole = make_tar(tmp_path / "whole.tar").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cut.tar").write_bytes(whole[: len(whole) // 2])
    ids, data, errors, _ = everything(planned(str(tmp_path / "in"), tmp_path / "out"))
    assert ids[-1] == "cut.tar#end"
    assert "ends too early" in str(errors[-1])
    assert 1 <= len([d for d in data if d is not None]) < COUNT
    assert data[0] == PICTURES[0]


def test_write_plan_limit_takes_the_first_images(photos: Path, tmp_path: Path) -> None:
    """A limit takes the first images of every countable input and is refused for tars."""
    for i, form in enumerate((lambda folder: "files", bytes_parquet, jsonl)):
        plan = planned(str(photos / form(photos)), tmp_path / str(i), limit=5)
        assert everything(plan)[1] == PICTURES[:5]
        assert (plan.images, plan.shards) == (5, 2)
    make_tar(tmp_path / "a.tar")
    with pytest.raises(InputError, match="--limit needs"):
        planned(str(tmp_path / "a.tar"), tmp_path / "t", limit=5)


def test_plan_of_record_restores_the_plan(photos: Path, tmp_path: Path) -> None:
    """A stored plan is the same when it is read from the job's record."""
    for name in ("files", bytes_parquet(photos), jsonl(photos)):
        options: dict[str, Any] = {} if name == "files" else {"keep": ["label"], "id_column": "key"}
        plan = planned(str(photos / name), tmp_path / name, **options)
        settings = {"image_column": "image", "id_column": None, "keep": [], "rows_per_file": 3} | options
        again = plan_of_record(
            parse_uri(str(tmp_path / name)), json.loads(json.dumps({"plan": plan.to_json()})) | settings
        )
        assert [again.shard(n) for n in range(again.shards)] == [plan.shard(n) for n in range(plan.shards)]
        assert (again.images, again.source.kept) == (plan.images, plan.source.kept)
        assert plan.ids(2) == (None if name == "t.parquet" else plan.ids(2))


def test_repeated_ids_agrees_with_and_without_ray(
    ray_session: None, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated and empty ids are counted alike in this process and by Ray Data."""
    files = []
    for number, ids in enumerate((["a", "b", "c"], ["d", "b", None], ["b", "c", "e"])):
        pq.write_table(pa.table({"key": ids}), tmp_path / f"{number}.parquet")
        files.append((parse_uri(str(tmp_path)), f"{number}.parquet".encode(), "key"))
    nulls, number, example = repeated_ids(files, 9)
    assert (nulls, number) == (1, 2)
    assert example in ("b", "c")
    monkeypatch.setattr("jobs.dataset.unique_ids.IDS_AT_ONCE", 5)
    nulls, number, example = repeated_ids(files, 9)
    assert (nulls, number) == (1, 2)
    assert example in ("b", "c")


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
            planned(str(tmp_path / name), tmp_path / "out" / name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.txt").write_text("not a list")
    with pytest.raises(InputError, match=r"a list .* is named itself"):
        planned(str(tmp_path / "folder"), tmp_path / "out")


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
    whole = bytearray(tar_of(tmp_path / "a.tar", *((f"{i}.png", PICTURES[i][:400]) for i in range(3))))
    second = 512 + 512  # after the first header and its file
    if damage == "flip":
        whole[second + 150] ^= 1  # in the checksum
    (tmp_path / "a.tar").write_bytes(whole if damage == "flip" else whole[: second + 300])
    ids, _, errors, _ = everything(planned(str(tmp_path / "a.tar"), tmp_path / "out"))
    assert ids == ["a.tar/0.png", "a.tar#end"]
    assert "header" in str(errors[-1]) or "unexpected end" in str(errors[-1])


def test_tars_give_every_member_an_id(tmp_path: Path) -> None:
    """Images that share a key, repeated names, odd names and links in a tar all become rows."""
    members = [(name, PICTURES[0]) for name in ("a.png", "a.jpg", "b.png", "b.png", "caf\udce9.png")]
    tar_of(tmp_path / "a.tar", *members)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
    ids, data, errors, _ = everything(planned(str(tmp_path / "a.tar"), tmp_path / "out"))
    names = ["a.png", "a.jpg", "b.png", "b.png#2", "caf%E9.png", "c.png"]
    assert ids == [f"a.tar/{name}" for name in names]
    assert data == [PICTURES[0]] * 5 + [None]
    assert errors[-1] == "it is a link to a.png"


def test_lists_do_not_convert_words(tmp_path: Path) -> None:
    """Words such as NA, null and dates stay text."""
    (tmp_path / "a.csv").write_text('image,c\n"NA",NA\nb,null\nc,"nan"\nd,\n')
    ids, _, _, kept = everything(planned(str(tmp_path / "a.csv"), tmp_path / "1", keep=["c"]))
    assert ids == ["NA", "b", "c", "d"]
    assert kept == [["NA", "null", "nan", None]]
    lines = [json.dumps({"image": "x", "id": f"2024-01-0{i}", "m": {"at": f"2024-01-0{i}"}}) for i in (1, 2)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    ids, _, _, kept = everything(planned(str(tmp_path / "b.jsonl"), tmp_path / "2", id_column="id", keep=["m"]))
    assert ids == ["2024-01-01", "2024-01-02"]
    assert kept == [[{"at": "2024-01-01"}, {"at": "2024-01-02"}]]


def test_lists_ignore_other_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that are not used may change their type within a list."""
    monkeypatch.setattr("jobs.sources.lists.BLOCK", 1000)
    rows = 200
    (tmp_path / "a.csv").write_text("image,zip\n" + "".join(f"{i}.jpg,{i}\n" for i in range(rows)) + "last.jpg,ABC\n")
    assert len(everything(planned(str(tmp_path / "a.csv"), tmp_path / "1", 1000))[0]) == rows + 1
    lines = [json.dumps({"image": f"{i}.jpg", "k": None}) for i in range(rows)]
    lines.append(json.dumps({"image": "last.jpg", "new": 1, "k": "text"}))
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    _, _, _, kept = everything(planned(str(tmp_path / "b.jsonl"), tmp_path / "2", 1000, keep=["k"]))
    assert kept[0][-2:] == [None, "text"]


def test_kept_columns_convert_views_and_refuse_others(tmp_path: Path) -> None:
    """Kept string views become plain strings, and types that Parquet cannot hold are refused."""
    views = pa.array(["a", None, "c"], pa.string_view())
    table = pa.table({"image": PICTURES[:3], "v": views, "e": pa.array([{}] * 3, pa.struct([])), "l": [[1], [2], [3]]})
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as file:
        file.write_table(table)
    plan = planned(str(tmp_path / "t.arrow"), tmp_path / "1", keep=["v"])
    assert plan.source.kept[0].type == pa.large_string()
    assert everything(plan)[3] == [["a", None, "c"]]
    for options, words in (({"keep": ["e"]}, "cannot be kept"), ({"id_column": "l"}, "must hold text or numbers")):
        with pytest.raises(InputError, match=words):
            planned(str(tmp_path / "t.arrow"), tmp_path / "2", **options)


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
    ids, data, errors, _ = everything(planned(str(tmp_path / "a.txt"), tmp_path / "out"))
    assert ids == lines
    assert data == [None] * len(lines)
    assert all(errors)
    assert "names no object" in str(errors[1])
    assert "No such file" in str(errors[2])


def test_listing_of_a_glob_refuses_unreadable_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A glob ends on cycles and refuses folders that cannot be read."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(PICTURES[0])
    (tmp_path / "a" / "loop").symlink_to("..")
    assert everything(planned(str(tmp_path / "**" / "*.png"), tmp_path.parent / "glob-out"))[0] == ["a/x.png"]
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if os.fsencode(path).endswith(b"/a"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match="cannot be listed: Permission denied"):
        planned(str(tmp_path / "*" / "*.png"), tmp_path.parent / "glob-out2")


def test_tables_take_null_structs_for_null(tmp_path: Path) -> None:
    """A null struct is null even where its child holds bytes."""
    kind = pa.struct({"bytes": pa.binary()})
    cells = pa.StructArray.from_arrays(
        [pa.array(PICTURES[:3], pa.binary())], fields=list(kind), mask=pa.array([False, True, False])
    )
    with pa.ipc.new_file(tmp_path / "t.arrow", pa.schema({"image": kind})) as file:
        file.write_table(pa.table({"image": cells}))
    assert everything(planned(str(tmp_path / "t.arrow"), tmp_path / "out"))[1] == [PICTURES[0], None, PICTURES[2]]
