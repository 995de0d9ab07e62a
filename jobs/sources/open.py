"""What to tokenize: folders, globs, tables, lists and tars of images become shards, one after the other.

A shard is a fixed slice of the listed input, and the unit of all work: one token file, one reject file. The slices
depend on the listing and on `rows_per_file` alone. `jobs.reading` turns a shard into bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain

from alit.images.formats import EXTENSIONS
from jobs.sources import columnar, lists
from jobs.sources.files import file_shards
from jobs.sources.listing import list_files
from jobs.sources.lists import open_lists
from jobs.sources.records import Input, InputError, Plan, Source
from jobs.sources.tables import open_tables
from jobs.sources.tars import TARS, open_tars


def make_plan(uri: str, *, rows_per_file: int, image_column: str = "image", id_column: str | None = None) -> Plan:
    """A whole input in memory, to read its images in any order or only the first ones.

    Raises:
        InputError: as `open_input`; or the input is tars, which can only be read from front to back.
    """
    found = open_input(uri, rows_per_file=rows_per_file, image_column=image_column, id_column=id_column)
    if found.source.kind == "tar":
        raise InputError(f"{uri!r} holds tars, which only `alit tokenize` reads; unpack them, or name Parquet files")
    return Plan(source=found.source, shards=tuple(found.shards))


def open_input(
    uri: str,
    *,
    rows_per_file: int,
    keep: Sequence[str] = (),
    image_column: str = "image",
    id_column: str | None = None,
) -> Input:
    """Finds out what an input is, and cuts it into shards while it is listed.

    Args:
        uri: a folder (its image files, or else its tables, or else its tars, at any depth), a glob, or one file, which
            may also be a list (.txt, .csv, .tsv, .jsonl) of paths and URIs; local, or at a URI such as
            `s3://bucket/folder`.
        rows_per_file: images per shard, at most; a tar is a shard, whatever it holds.
        keep: columns to carry through; of tars the extensions of text files that lie beside the images.
        image_column: the column that holds the images: bytes, plain or as `struct<bytes, path>`, or paths and URIs.
        id_column: the column with unique ids.

    Raises:
        InputError: nothing to tokenize, a missing column, or files that cannot be read; some of it only when the
            shards are taken.
    """
    if rows_per_file < 1:
        raise InputError(f"--rows-per-file must be at least 1, got {rows_per_file}")
    root, names, folder = list_files(uri)
    before: list[bytes] = []
    first = None
    for name in names:
        if _extension(name) in _IMAGES:
            first = name
            break
        before.append(name)
    if first is not None:
        if keep or id_column:
            option = "--keep" if keep else "--id-column"
            raise InputError(f"{option} needs a table or a list; {uri!r} holds image files, which have no columns")
        pictures = (name for name in chain([first], names) if _extension(name) in _IMAGES)
        return Input(source=Source(root=root), shards=file_shards(pictures, rows_per_file))
    source = Source(root=root, image_column=image_column, id_column=id_column, keep=tuple(keep))
    if tables := [name for name in before if _extension(name) in _TABLES]:
        return open_tables(source, tables, rows_per_file)
    if tars := [name for name in before if name.lower().endswith(tuple(e.encode() for e in TARS))]:
        return open_tars(source, tars)
    if not folder and (found := [name for name in before if _extension(name) in _LISTS]):
        return open_lists(source, found, rows_per_file)
    raise InputError(
        f"no images in {uri!r}: looked for {', '.join(sorted(EXTENSIONS))} files, Parquet, Arrow and tars at any "
        f"depth; a list ({', '.join(sorted(lists.EXTENSIONS))}) is named itself"
    )


def _extension(name: bytes) -> bytes:
    return os.path.splitext(name)[1].lower()


_IMAGES = {extension.encode() for extension in EXTENSIONS}


_TABLES = {extension.encode() for extension in columnar.EXTENSIONS}


_LISTS = {extension.encode() for extension in lists.EXTENSIONS}
