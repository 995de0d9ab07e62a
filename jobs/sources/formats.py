"""The table of input formats. A new format is a module with a `Format`, and one entry in `FORMATS`."""

from __future__ import annotations

from jobs.sources.files import IMAGE_FILES
from jobs.sources.lists import LISTS
from jobs.sources.records import Format, Source
from jobs.sources.tables import TABLES
from jobs.sources.tars import TARS

FORMATS: tuple[Format, ...] = (IMAGE_FILES, TABLES, TARS, LISTS)
"""In order of precedence. Files of the first format are listed lazily, as their names may not fit into memory."""


def format_of(source: Source) -> Format:
    """Returns the format of a source's shards."""
    return next(format_ for format_ in FORMATS if format_.kind == source.kind)
