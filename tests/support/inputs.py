"""Inputs of every form, and how they are planned and read."""

from __future__ import annotations

import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alit.images.encode import encode_image
from jobs.dataset.plan import StoredPlan, write_plan
from jobs.sources.open import open_input
from jobs.sources.read import read_batches
from jobs.sources.records import InputError, Plan, Rows
from jobs.storage.path import parse_uri

COUNT = 7

LABELS = [{"name": f"label {i}", "boxes": [i, i + 1]} for i in range(COUNT)]


def shade_image(i: int) -> bytes:
    """Returns a file of one gray level, in PNG or JPEG by turns."""
    shade = np.full((20 + i, 30, 3), 10 * i, np.uint8)
    return encode_image(shade, "jpeg" if i % 2 else "png")


IMAGES = [shade_image(i) for i in range(COUNT)]


def formatted(form: str) -> list[str]:
    """Returns a text with every image's number in it."""
    return [form.format(i) for i in range(COUNT)]


def as_table(folder: Path, images: pa.Array) -> pa.Table:
    """Returns a table of the images, with a key and a nested label."""
    return pa.table({"image": images, "key": formatted("k{}"), "label": LABELS})


def bytes_parquet(folder: Path) -> str:
    """Writes a Parquet table of image bytes, and returns its name."""
    pq.write_table(as_table(folder, pa.array(IMAGES, pa.binary())), folder / "t.parquet", row_group_size=2)
    return "t.parquet"


def struct_parquet(folder: Path) -> str:
    """Writes a Parquet table of bytes and paths, one of them without bytes, and returns its name."""
    cells = [{"bytes": data if i != 3 else None, "path": f"files/{i}.jpg"} for i, data in enumerate(IMAGES)]
    pq.write_table(as_table(folder, pa.array(cells)), folder / "s.parquet")
    return "s.parquet"


def links_parquet(folder: Path) -> str:
    """Writes a Parquet table of links, and returns its name."""
    pq.write_table(as_table(folder, pa.array(formatted("files/{}.jpg"))), folder / "l.parquet")
    return "l.parquet"


def arrow_file(folder: Path) -> str:
    """Writes an Arrow file of image bytes, and returns its name."""
    table = as_table(folder, pa.array(IMAGES, pa.large_binary()))
    with pa.ipc.new_file(folder / "f.arrow", table.schema) as file:
        file.write_table(table, 3)
    return "f.arrow"


def arrow_stream(folder: Path) -> str:
    """Writes an Arrow stream of image bytes, and returns its name."""
    table = as_table(folder, pa.array(IMAGES, pa.binary()))
    with pa.OSFile(str(folder / "s.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as file:
        file.write_table(table, 3)
    return "s.arrow"


def jsonl(folder: Path) -> str:
    """Writes a JSON Lines list of links, and returns its name."""
    lines = [
        json.dumps({"image": f"files/{i}.jpg", "key": f"k{i}", "label": LABELS[i]}, ensure_ascii=False) + "\n"
        for i in range(COUNT)
    ]
    (folder / "list.jsonl").write_text("".join(lines))
    return "list.jsonl"


def stored_plan(uri: str, out: Path, rows: int = 3, limit: int | None = None, **options: Any) -> StoredPlan:
    """Plans an input and stores the plan in a folder."""
    return write_plan(parse_uri(str(out)), open_input(uri, rows_per_file=rows, **options), rows, limit)


def read_everything(plan: StoredPlan) -> tuple[list[str], list[bytes | None], list[str | None], list[list[Any]]]:
    """Returns ids, data, errors and kept columns of all shards."""
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


def write_tar(path: Path, mode: str = "w") -> Path:
    """Writes a tar of the images with captions, and of irregular samples."""
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for i, data in enumerate(IMAGES):
            add(f"part/{i:03}.txt", f"caption {i}".encode())
            add(f"part/{i:03}.{'png' if i % 2 else 'seg.jpg'}" if i == 3 else f"part/{i:03}.jpg", data)
            add(f"part/{i:03}.json", json.dumps({"n": i}).encode())
        add("part/lonely.json", b"{}")
        add("part/000.jpg", IMAGES[0])
    return path


def write_files(folder: Path, *names: str | bytes) -> None:
    """Writes files that hold their own relative names."""
    for name in names:
        raw = os.fsencode(name)
        path = os.path.join(os.fsencode(folder), raw)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(raw)


def write_table(path: Path, rows: int = 5, *, row_group_size: int | None = None, **columns: pa.Array | list) -> Path:
    """Writes a Parquet table whose images hold its name and their row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([os.fsencode(f"{path.name} {row}") for row in range(rows)], pa.binary())
    pq.write_table(pa.table({"image": images} | columns), path, row_group_size=row_group_size)
    return path


def plan_of(source: Path | str, rows_per_file: int = 2, **options: object) -> Plan:
    """Returns the plan of an input in memory."""
    found = open_input(str(source), rows_per_file=rows_per_file, **options)
    return Plan(source=found.source, shards=tuple(found.shards))


def read_shards(plan: Plan, max_bytes: int = 1000) -> list[Rows]:
    """Returns the rows of every shard."""
    with ThreadPoolExecutor(2) as pool:
        return [next(read_batches(plan.source, shard, 1000, max_bytes, pool)) for shard in plan.shards]


def data_by_id(plan: Plan) -> dict[str, bytes | None]:
    """Returns the data of every id, after checking that no id occurs twice."""
    rows = read_shards(plan)
    found = {name: data for part in rows for name, data in zip(part.ids, part.data, strict=True)}
    assert len(found) == sum(len(part.ids) for part in rows) == plan.images
    assert [len(part.ids) for part in rows] == [shard.rows for shard in plan.shards]
    return found


def refusal(source: Path | str, rows_per_file: int = 2, **options: object) -> str:
    """Returns the error with which an input is refused."""
    with pytest.raises(InputError) as caught:
        plan_of(source, rows_per_file, **options)
    return str(caught.value)
