"""Promises of the plan: what is listed, how it is cut into shards, under which ids, and what is refused. No Ray."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.dataset.plan import write_plan
from jobs.sources.open import open_input
from jobs.sources.read import read_batches
from jobs.sources.records import InputError, Plan, Rows
from jobs.storage.path import parse_uri

NOT_UTF8 = b"caf\xe9 100%.jpg"


def write(folder: Path, *names: str | bytes) -> None:
    """Files that hold their own relative name."""
    for name in names:
        raw = os.fsencode(name)
        path = os.path.join(os.fsencode(folder), raw)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(raw)


def table(path: Path, rows: int = 5, *, row_group_size: int | None = None, **columns: pa.Array | list) -> Path:
    """A Parquet file whose images hold its own name and their row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([os.fsencode(f"{path.name} {row}") for row in range(rows)], pa.binary())
    pq.write_table(pa.table({"image": images} | columns), path, row_group_size=row_group_size)
    return path


def plan_of(source: Path | str, rows_per_file: int = 2, **options: object) -> Plan:
    found = open_input(str(source), rows_per_file=rows_per_file, **options)
    return Plan(source=found.source, shards=tuple(found.shards))


def read(plan: Plan, max_bytes: int = 1000) -> list[Rows]:
    with ThreadPoolExecutor(2) as pool:
        return [next(read_batches(plan.source, shard, 1000, max_bytes, pool)) for shard in plan.shards]


def pairs(plan: Plan) -> dict[str, bytes | None]:
    """Data by id, where no id comes twice."""
    rows = read(plan)
    found = {name: data for part in rows for name, data in zip(part.ids, part.data, strict=True)}
    assert len(found) == sum(len(part.ids) for part in rows) == plan.images
    assert [len(part.ids) for part in rows] == [shard.rows for shard in plan.shards]
    return found


# -------------------------------------------------------------------- listing


def test_listing_of_a_folder_gives_relative_paths(tmp_path: Path) -> None:
    """A folder gives its image files at any depth, with their relative paths as ids."""
    write(tmp_path, "b.JPG", "a/1.png", "a/deep/2.jpeg", "a/note.txt", "x.jpg/inside.webp")
    found = pairs(plan_of(tmp_path))
    assert found == {n: n.encode() for n in ("b.JPG", "a/1.png", "a/deep/2.jpeg", "x.jpg/inside.webp")}


@pytest.mark.parametrize("form", ["{}/", "{}/../in", "file://{}"])
def test_listing_accepts_other_forms_of_a_path(tmp_path: Path, form: str) -> None:
    """A trailing slash, a path through the parent and a file URI name the same folder."""
    write(tmp_path / "in", "a.jpg", "b/c.jpg")
    assert plan_of(form.format(tmp_path / "in")) == plan_of(tmp_path / "in")


def test_listing_resolves_relative_folders_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder is resolved against the working folder at the time of planning."""
    write(tmp_path / "in", "a.jpg")
    monkeypatch.chdir(tmp_path)
    plan = plan_of("in")
    monkeypatch.chdir("/")
    assert pairs(plan) == {"a.jpg": b"a.jpg"}


def test_listing_skips_hidden_files(tmp_path: Path) -> None:
    """Hidden files and folders are skipped."""
    write(tmp_path, "a.jpg", ".b.jpg", ".thumbs/c.jpg", "d/.e.jpg")
    assert set(pairs(plan_of(tmp_path))) == {"a.jpg"}
    assert set(pairs(plan_of(f"file://{tmp_path}"))) == {"a.jpg"}


def test_listing_of_a_glob_gives_ids_below_its_fixed_part(tmp_path: Path) -> None:
    """A glob gives ids that are relative to its part without wildcards."""
    write(tmp_path, "a/1.jpg", "b/2.jpg", "b/3.png", "b/deep/4.jpg")
    assert pairs(plan_of(tmp_path / "*" / "*.jpg")) == {"a/1.jpg": b"a/1.jpg", "b/2.jpg": b"b/2.jpg"}
    assert set(pairs(plan_of(tmp_path / "b" / "**" / "*.jpg"))) == {"2.jpg", "deep/4.jpg"}


def test_listing_takes_wildcards_of_existing_names_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wildcard characters in the name of an existing folder are taken literally."""
    write(tmp_path / "[2020] trip*", "1.jpg", "2.jpg")
    monkeypatch.chdir(tmp_path / "[2020] trip*")
    assert set(pairs(plan_of("*.jpg"))) == {"1.jpg", "2.jpg"}
    assert set(pairs(plan_of(tmp_path / "[2020] trip*"))) == {"1.jpg", "2.jpg"}


def test_open_input_accepts_a_single_file(tmp_path: Path) -> None:
    """A single image or a single table is an input, under its file's name."""
    write(tmp_path, "a b.jpg", "other.jpg")
    assert pairs(plan_of(tmp_path / "a b.jpg")) == {"a b.jpg": b"a b.jpg"}
    path = table(tmp_path / "t.parquet", 3)
    expected = {f"t.parquet#{row}": f"t.parquet {row}".encode() for row in range(3)}
    assert pairs(plan_of(path)) == pairs(plan_of(f"file://{path}")) == expected


def test_tables_of_a_folder_are_read_in_order(tmp_path: Path) -> None:
    """The tables of a folder are read in the order of their names."""
    table(tmp_path / "b.parquet", 3)
    table(tmp_path / "a" / "z.PARQUET", 2)
    assert [name for part in read(plan_of(tmp_path)) for name in part.ids] == [
        *("a/z.PARQUET#0", "a/z.PARQUET#1", "b.parquet#0", "b.parquet#1", "b.parquet#2")
    ]


def test_listing_escapes_names_that_are_not_utf8(tmp_path: Path) -> None:
    """File names with any bytes become readable ids, and the files can be read."""
    names = ["a b.jpg", "ü/日本.jpg", "new\nline.jpg", "100%.jpg", "quote'\".jpg", "emoji 🎈.png"]
    write(tmp_path, *names, NOT_UTF8, b"\xff\xfe/x.jpg")
    expected = {name: name.encode() for name in names} | {
        "caf%E9 100%25.jpg": NOT_UTF8,
        "%FF%FE/x.jpg": b"\xff\xfe/x.jpg",
    }
    assert pairs(plan_of(tmp_path)) == pairs(plan_of(tmp_path / "**" / "*")) == expected


def test_tables_may_have_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A table whose name is not UTF-8 can be read."""
    table(tmp_path / "t.parquet", 1).rename(tmp_path / "\udcff.parquet")
    assert pairs(plan_of(tmp_path)) == {"%FF.parquet#0": b"t.parquet 0"}


def test_listing_follows_links_without_cycles(tmp_path: Path) -> None:
    """Links to folders are followed, and cycles end."""
    write(tmp_path, "in/a.jpg", "in/b/c.jpg", "elsewhere/d.jpg")
    (tmp_path / "in" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "b" / "over").symlink_to("../../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self").symlink_to("self")
    assert set(pairs(plan_of(tmp_path / "in"))) == {"a.jpg", "b/c.jpg", "b/over/d.jpg"}


# -------------------------------------------------------------------- shards


@settings(max_examples=30, deadline=None)
@given(
    stems=st.sets(st.text("abcé /", min_size=1, max_size=5).filter(lambda s: s.strip("/ ") == s and "//" not in s)),
    rows_per_file=st.integers(1, 9),
)
def test_shards_partition_the_listing(
    tmp_path_factory: pytest.TempPathFactory, stems: set[str], rows_per_file: int
) -> None:
    """Every image is in exactly one shard, and shards depend on the listing alone."""
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    names = [f"{stem}.jpg" for stem in stems] + ["last.png"]
    write(one, *names)
    write(other, *reversed(names), "note.txt")
    plan = plan_of(one, rows_per_file)
    assert plan.shards == plan_of(other, rows_per_file).shards
    assert plan == plan_of(one, rows_per_file)
    listed = [name for shard in plan.shards for name in shard.ids]
    assert sorted(listed) == sorted(names)
    assert all(shard.rows == rows_per_file for shard in plan.shards[:-1])
    assert [shard.number for shard in plan.shards] == list(range(len(plan.shards)))
    assert pairs(plan) == {name: name.encode() for name in names}


@pytest.mark.parametrize("rows_per_file", [1, 2, 3, 4, 7, 11, 50])
def test_table_shards_read_rows_across_row_groups(tmp_path: Path, rows_per_file: int) -> None:
    """A shard of a table reads exactly its rows, wherever row groups begin and end."""
    table(tmp_path / "t.parquet", 11, row_group_size=3, label=list(range(11)))
    plan = plan_of(tmp_path, rows_per_file, keep=["label"])
    assert pairs(plan) == {f"t.parquet#{row}": f"t.parquet {row}".encode() for row in range(11)}
    assert [value for part in read(plan) for value in part.kept[0].to_pylist()] == list(range(11))


def test_rows_slices_keep_columns_aligned() -> None:
    """Slices of rows keep ids, data, errors and kept columns aligned."""
    kept = pa.array(range(5))
    rows = Rows(
        ids=list("abcde"), data=[b"1", None, b"3", b"4", None], errors=[None, "x", None, None, "y"], kept=[kept]
    )
    parts = list(rows.slices(2))
    assert [part.ids for part in parts] == [["a", "b"], ["c", "d"], ["e"]]
    assert [part.errors for part in parts] == [[None, "x"], [None, None], ["y"]]
    assert [part.kept[0].to_pylist() for part in parts] == [[0, 1], [2, 3], [4]]


# -------------------------------------------------------------------- reading


def test_fetch_reports_unreadable_files_as_errors(tmp_path: Path) -> None:
    """Missing files, folders, pipes, devices and broken links become rows with an error, without a hang."""
    write(tmp_path, "good.jpg", "gone.jpg", "folder.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    plan = plan_of(tmp_path, 100)
    (tmp_path / "gone.jpg").unlink()
    (tmp_path / "folder.jpg").unlink()
    (tmp_path / "folder.jpg").mkdir()
    (rows,) = read(plan)
    errors = dict(zip(rows.ids, rows.errors, strict=True))
    assert errors.pop("good.jpg") is None
    assert sorted(errors) == ["broken.jpg", "device.jpg", "folder.jpg", "gone.jpg", "loop.jpg", "pipe.jpg"]
    assert all(error is not None and error.startswith("the file cannot be read: ") for error in errors.values())
    assert "not a regular file" in str(errors["pipe.jpg"])
    assert [data for data, error in zip(rows.data, rows.errors, strict=True) if error] == [None] * 6


def test_fetch_reads_one_byte_beyond_the_limit(tmp_path: Path) -> None:
    """Of a file above the size limit, one byte beyond the limit is read."""
    (tmp_path / "a.jpg").write_bytes(b"x" * 5000)
    assert [len(data or b"") for part in read(plan_of(tmp_path), max_bytes=100) for data in part.data] == [101]


def test_tables_of_structs_hold_bytes_or_paths(tmp_path: Path) -> None:
    """Cells of bytes and path give their bytes or the file beside the table, and null cells an error."""
    cells = [{"bytes": b"1", "path": "p"}, {"bytes": None, "path": "q"}, None, {"bytes": b"4", "path": None}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "t.parquet", row_group_size=3)
    (tmp_path / "q").write_bytes(b"beside the table")
    (rows,) = read(plan_of(tmp_path, 10))
    assert rows.data == [b"1", b"beside the table", None, b"4"]
    assert [error is None for error in rows.errors] == [True, True, False, True]
    assert "'image' is null" in str(rows.errors[2])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_tables_report_null_cells_as_errors(tmp_path: Path, kind: pa.DataType) -> None:
    """A null cell in the image column becomes a row with an error."""
    pq.write_table(pa.table({"photo": pa.array([b"1", None, b"3"], kind)}), tmp_path / "t.parquet")
    (rows,) = read(plan_of(tmp_path, 10, image_column="photo"))
    assert rows.data == [b"1", None, b"3"]
    assert rows.errors[1] == "the column 'photo' is null here"


def test_tables_take_ids_from_a_column_of_any_plain_type(tmp_path: Path) -> None:
    """Ids may come from a column of numbers, as text."""
    table(tmp_path / "t.parquet", 3, key=pa.array([7, 5, 6], pa.int32()))
    assert list(pairs(plan_of(tmp_path, id_column="key"))) == ["7", "5", "6"]


def test_kept_columns_keep_types_and_prefix_collisions(tmp_path: Path) -> None:
    """Kept columns keep their types, and names that collide with ours get a prefix."""
    boxes = pa.array(
        [[{"x": 1, "tags": ["a"]}], [], None], pa.list_(pa.struct({"x": pa.int8(), "tags": pa.list_(pa.string())}))
    )
    label = pa.array(["cat", None, "dog"]).dictionary_encode()
    when = pa.array([1, 2, 3], pa.timestamp("ms", tz="UTC"))
    table(tmp_path / "t.parquet", 3, boxes=boxes, label=label, width=[1, 2, 3], when=when)
    plan = plan_of(tmp_path, 2, keep=["boxes", "width", "label", "when"])
    assert [(field.name, field.type) for field in plan.source.kept] == [
        ("boxes", boxes.type),
        ("input_width", pa.int64()),
        ("label", label.type),
        ("when", when.type),
    ]
    first, second = read(plan)
    assert first.kept[0].to_pylist() + second.kept[0].to_pylist() == boxes.to_pylist()
    assert first.kept[2].to_pylist() + second.kept[2].to_pylist() == ["cat", None, "dog"]


def test_kept_columns_are_nullable(tmp_path: Path) -> None:
    """A kept column may be nullable in one file only, and is nullable in the output."""
    table(tmp_path / "a.parquet", 2, label=pa.array([None, "x"]))
    strict = pa.schema([pa.field("image", pa.binary()), pa.field("label", pa.string(), nullable=False)])
    pq.write_table(pa.table({"image": [b"1"], "label": ["y"]}, strict), tmp_path / "b.parquet")
    assert all(field.nullable for field in plan_of(tmp_path, keep=["label"]).source.kept)


# -------------------------------------------------------------------- refusals


def refusal(source: Path | str, rows_per_file: int = 2, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        plan_of(source, rows_per_file, **options)
    return str(caught.value)


def test_open_input_refuses_an_input_without_images(tmp_path: Path) -> None:
    """An input without images is refused."""
    assert "no images in" in refusal(tmp_path)
    write(tmp_path, "a.dat", "b/.jpg")
    assert ".jpeg" in refusal(tmp_path)
    assert "no images in" in refusal(tmp_path / "a.dat")
    assert "no images in" in refusal(tmp_path / "*.png")


@pytest.mark.parametrize("uri", ["nowhere", "/nowhere/at/all", "file:///nowhere/at/all"])
def test_listing_refuses_a_missing_input(uri: str) -> None:
    """An input that does not exist is refused."""
    assert "does not exist" in refusal(uri)


def test_listing_refuses_an_empty_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty name is refused and does not mean the working folder."""
    write(tmp_path, "a.jpg")
    monkeypatch.chdir(tmp_path)
    assert "has no name" in refusal("")


def repetition(source: Path, out: Path, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        write_plan(parse_uri(str(out)), open_input(str(source), rows_per_file=2, **options), 2, None)
    return str(caught.value)


def test_write_plan_refuses_repeated_and_empty_ids(tmp_path: Path) -> None:
    """Repeated and empty ids are refused with their number and an example."""
    write(tmp_path / "files", "%FF.jpg", b"\xff.jpg", "a.jpg")
    out = tmp_path / "out"
    assert "1 of the file names" in (message := repetition(tmp_path / "files", out))
    assert "'%FF.jpg'" in message
    table(tmp_path / "t.parquet", 5, key=["a", "b", "b", "c", "c"], number=[1, 2, None, None, 3])
    assert "2 of column 'key'" in (message := repetition(tmp_path / "t.parquet", out, id_column="key"))
    assert "'b'" in message
    assert "2 empty ids" in repetition(tmp_path / "t.parquet", out, id_column="number")
    path = table(tmp_path / "tables" / "%FF.parquet")
    path.with_name("\udcff.parquet").write_bytes(path.read_bytes())
    assert "'%FF.parquet'" in refusal(tmp_path / "tables")


def test_write_plan_refuses_ids_repeated_across_files(tmp_path: Path) -> None:
    """Ids must be unique across files too."""
    table(tmp_path / "a.parquet", 2, key=["a", "b"])
    table(tmp_path / "b.parquet", 2, key=["c", "a"])
    assert "'a'" in repetition(tmp_path, tmp_path / "out", id_column="key")


def test_tables_refuse_a_missing_column(tmp_path: Path) -> None:
    """A missing column is refused, with the columns that exist."""
    table(tmp_path / "t.parquet", label=list("abcde"))
    for options in ({"image_column": "jpg"}, {"keep": ["jpg"]}, {"id_column": "jpg"}):
        assert "has no column 'jpg'; it has image, label" in refusal(tmp_path, **options)


def test_tables_refuse_a_duplicate_column(tmp_path: Path) -> None:
    """A table that has the image column twice is refused."""
    pq.write_table(pa.table([pa.array([b"1"]), pa.array([b"2"])], ["image", "image"]), tmp_path / "t.parquet")
    assert "'t.parquet' has several columns 'image'" in refusal(tmp_path)


def test_tables_refuse_an_image_column_without_bytes(tmp_path: Path) -> None:
    """An image column of another type than bytes is refused, with its type."""
    table(tmp_path / "t.parquet", label=list(range(5)), url=[{"path": "x"}] * 5)
    assert "must hold image bytes" in (message := refusal(tmp_path, image_column="label"))
    assert "int64" in message
    assert "must hold image bytes" in refusal(tmp_path, image_column="url")


def test_open_input_refuses_table_options_for_files(tmp_path: Path) -> None:
    """Options about columns are refused for image files."""
    write(tmp_path, "a.jpg")
    assert "--keep needs a table or a list" in refusal(tmp_path, keep=["label"])
    assert "--id-column needs a table or a list" in refusal(tmp_path, id_column="label")


def test_kept_columns_refuse_duplicates(tmp_path: Path) -> None:
    """A column that would be twice in the output is refused."""
    table(tmp_path / "t.parquet", id=[1] * 5, input_id=[2] * 5)
    assert "twice" in refusal(tmp_path, keep=["id", "id"])
    assert "input_id, input_id" in refusal(tmp_path, keep=["id", "input_id"])


def test_kept_columns_refuse_differing_types(tmp_path: Path) -> None:
    """A kept column must have the same type in every table."""
    table(tmp_path / "a.parquet", label=[1] * 5)
    table(tmp_path / "b.parquet", label=["x"] * 5)
    assert "'b.parquet' has other types" in refusal(tmp_path, keep=["label"])


def test_tables_refuse_unreadable_files(tmp_path: Path) -> None:
    """A table that is cut, a pipe or a broken link is refused."""
    path = table(tmp_path / "cut.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    assert "'cut.parquet' cannot be read as a table" in refusal(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in refusal(tmp_path)
    path.unlink()
    path.symlink_to("nowhere")
    assert "cannot be read as a table" in refusal(tmp_path)


def test_tables_without_rows_are_skipped(tmp_path: Path) -> None:
    """Tables without rows are skipped, and refused where there are no others."""
    table(tmp_path / "a.parquet", 0)
    assert "have no rows" in refusal(tmp_path)
    table(tmp_path / "b.parquet", 2)
    assert set(pairs(plan_of(tmp_path))) == {"b.parquet#0", "b.parquet#1"}


@pytest.mark.parametrize("rows", [0, -3])
def test_open_input_refuses_shards_without_rows(tmp_path: Path, rows: int) -> None:
    """The number of rows per file must be at least 1."""
    assert f"--rows-per-file must be at least 1, got {rows}" in refusal(tmp_path, rows)


def test_listing_refuses_an_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without read permission is refused, with the system's reason."""
    write(tmp_path, "a.jpg")

    def denied(path: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "cannot be listed: Permission denied" in refusal(tmp_path)
