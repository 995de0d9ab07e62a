"""Opens an input: finds its format and cuts its files into shards.

The shards depend on the listing and on `rows_per_file` alone. `jobs.sources.read` reads the bytes of a shard's images.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from alit.validation import require_range
from jobs.sources.formats import FORMATS, format_of
from jobs.sources.listing import list_files
from jobs.sources.records import Input, InputError, Plan, Source


def make_plan(uri: str, *, rows_per_file: int, image_column: str = "image", id_column: str | None = None) -> Plan:
    """Lists a complete input in memory, to read its images in any order or only the first ones.

    Args:
        uri: The input, see `open_input`.
        rows_per_file: Maximum number of images per shard.
        image_column: The column that holds the images.
        id_column: The column with unique ids.

    Raises:
        InputError: as `open_input`; or the format can only be read from front to back, as tars are.
    """
    opened = open_input(uri, rows_per_file=rows_per_file, image_column=image_column, id_column=id_column)
    if (format_ := format_of(opened.source)).read_rows is None:
        raise InputError(
            f"{uri!r} holds {format_.description}, which only `alit tokenize` reads; unpack them, or name Parquet files"
        )
    return Plan(source=opened.source, shards=tuple(opened.shards))


def open_input(
    uri: str,
    *,
    rows_per_file: int,
    keep: Sequence[str] = (),
    image_column: str = "image",
    id_column: str | None = None,
) -> Input:
    """Detects the format of an input and cuts it into shards, lazily.

    Args:
        uri: A folder (its image files, or else its tables, or else its tars, at any depth), a glob, or one file, which
            may also be a list (.txt, .csv, .tsv, .jsonl) of paths and URIs; local, or a URI such as
            `s3://bucket/folder`.
        rows_per_file: Maximum number of images per shard; a tar is always one shard.
        keep: The columns to carry through; for tars the extensions of text files that accompany the images.
        image_column: The column that holds the images: bytes, plain or as `struct<bytes, path>`, or paths and URIs.
        id_column: The column with unique ids.

    Raises:
        InputError: there are no images, a column is missing, or files cannot be read; some errors are only raised when
            the shards are consumed.
    """
    require_range("--rows-per-file", rows_per_file, 1, error=InputError)
    root, names, is_folder = list_files(uri)
    source = Source(root=root, image_column=image_column, id_column=id_column, keep=tuple(keep))
    first_format, *other_formats = FORMATS
    other_names: list[bytes] = []
    for name in names:
        if first_format.matches(name):
            matching = chain([name], filter(first_format.matches, names))
            return first_format.open(uri, source, matching, rows_per_file)
        other_names.append(name)
    for format_ in other_formats:
        matching = [name for name in other_names if format_.matches(name)]
        if matching and (format_.in_folders or not is_folder):
            return format_.open(uri, source, matching, rows_per_file)
    raise InputError(f"no images in {uri!r}: looked for {_expected_files()}")


def _expected_files() -> str:
    *descriptions, last = [format_.description for format_ in FORMATS if format_.in_folders]
    named = [format_.description for format_ in FORMATS if not format_.in_folders]
    return f"{', '.join(descriptions)} and {last} at any depth; {' or '.join(named)} must be named directly"
